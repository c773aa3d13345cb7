"""metrics.jsonl as columns: a sweep has hundreds of such files, and dicts of all their rows would not fit in memory.

Arrow reads a file into columns without a Python object a value. Histograms and lists stay Arrow's, one column each,
and become Python objects where they are looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from cggr_ray.schema import KIND, STEP

# A row may not be longer.
LONGEST_ROW_BYTES = 1 << 24


def parse(content: bytes, kinds: Sequence[str]) -> pa.Table:
    """The rows of one file, a column a key; null where a row lacks it.

    Raises:
        pa.ArrowInvalid (a ValueError): a line that is no object, that has no integer step or none of `kinds`, or a key
            whose values have different types.
    """
    if not content.strip():
        return pa.table({KIND: pa.array([], pa.string()), STEP: pa.array([], pa.int64())})
    options = pj.ReadOptions(use_threads=False, block_size=LONGEST_ROW_BYTES)
    table = pj.read_json(pa.BufferReader(content), read_options=options)
    if table.num_rows != sum(1 for line in content.split(b"\n") if line.strip()):
        raise pa.ArrowInvalid("not one object a line")
    if not {KIND, STEP} <= set(table.column_names) or table[STEP].type != pa.int64() or table[STEP].null_count:
        raise pa.ArrowInvalid(f"a row without {KIND} or an integer {STEP}")
    if not pc.all(pc.is_in(table[KIND], value_set=pa.array(kinds))).as_py():
        raise pa.ArrowInvalid(f"a row whose {KIND} is unknown")
    return table


def surviving(table: pa.Table) -> tuple[pa.Table, int]:
    """As `analysis.frames.surviving_rows`, of columns; the rows that say so stay."""
    resumed = np.flatnonzero(pc.equal(table[KIND], "resumed").to_numpy())
    if not len(resumed):
        return table, 0
    steps, kept = table[STEP].to_numpy(), np.ones(table.num_rows, dtype=bool)
    for row in resumed:
        kept[:row] &= steps[:row] <= steps[row]
    return table.filter(pa.array(kept)), len(resumed)


def of_kind(table: pa.Table, kind: str) -> pa.Table:
    """The rows of one kind, without the columns in which only other kinds have values."""
    own = table.filter(pc.equal(table[KIND], kind)).drop_columns([KIND])
    others = {name for name in own.column_names if own[name].null_count == own.num_rows and own.num_rows}
    return own.drop_columns([name for name in others if table[name].null_count < table.num_rows])


def to_frame(tables: Iterable[tuple[dict[str, object], pa.Table]], first: Sequence[str]) -> pd.DataFrame:
    """The rows of all tables in one frame, each with its own constants in front; columns begin with `first`.

    A column of numbers and nulls is numeric, null being NaN; one of objects or lists is Arrow's.
    """
    whole = pa.concat_tables([_with(constants, own) for constants, own in tables], promote_options="permissive")
    names = [name for name in first if name in whole.column_names]
    names += [name for name in whole.column_names if name not in first]
    frame = whole.select(names).to_pandas(types_mapper=_nested, split_blocks=True)
    for name in whole.column_names:
        if pa.types.is_null(whole.schema.field(name).type):
            frame[name] = np.nan
    return frame.reindex(columns=list(dict.fromkeys((*first, *names))))


def _with(constants: dict[str, object], table: pa.Table) -> pa.Table:
    for number, (name, value) in enumerate(constants.items()):
        table = table.add_column(number, name, pa.repeat(pa.scalar(value), table.num_rows))
    return table


def _nested(kind: pa.DataType) -> pd.ArrowDtype | None:
    return pd.ArrowDtype(kind) if pa.types.is_nested(kind) else None
