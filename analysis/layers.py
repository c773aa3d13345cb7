"""Which layers learnt: how many and for how long, and what the probes found of every layer's relevance.

A step row speaks for all steps since the row before it, and the train seconds between the two are shared out among them
evenly. A probe speaks for itself alone; the steps before it went on as they were.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.frames import IDENTITY, Race
from cggr_ray.schema import ACTIVE_LAYERS, PROBE, RELEVANCE, STEP, TRAIN_SECONDS

# Every layer learns before any has rested, in a probe, between rests, or after the last rest; else some rest.
START, PROBES, RESTING, BETWEEN, END = MODES = ("start", "probes", "resting", "between", "end")


def layer_rows(race: Race) -> pd.DataFrame:
    """The step rows, in order, of the runs in which a layer ever rested or was measured; empty where there are none.

    Columns beside those of the rows: `layers` of the model, or else the most that learnt in any step of the race;
    `depth`, those that learn between probes; `mode`; `seconds` of the steps that are no probes; `probe_seconds`.
    """
    if ACTIVE_LAYERS not in race.steps.columns:
        return race.steps.iloc[:0]
    steps = race.steps.dropna(subset=[ACTIVE_LAYERS])
    known = race.runs.set_index("trial_id").reindex(columns=["model/layers"])["model/layers"]
    layers = known.fillna(steps[ACTIVE_LAYERS].max())
    runs = [
        _timed(rows.sort_values(STEP), layers[trial])
        for trial, rows in steps.groupby("trial_id", sort=False)
        if rows[ACTIVE_LAYERS].min() < layers[trial] or (rows[PROBE] == 1).any()
    ]
    return pd.concat(runs) if runs else steps.iloc[:0]


def layer_measures(race: Race) -> pd.DataFrame:
    """One row a run of `layer_rows`.

    `mean_active` is over train seconds; `switches` counts changes of depth between steps that are no probes; there are
    `seconds/<mode>` for all MODES; `steps_per_row` above 1 means that probes and switches may have happened unseen.
    """
    table: list[dict[str, object]] = []
    for identity, rows in layer_rows(race).groupby(list(IDENTITY), sort=False):
        seconds = rows.groupby("mode")["seconds"].sum().reindex(MODES, fill_value=0.0)
        seconds[PROBES] = rows["probe_seconds"].sum()
        learnt = rows["layers"] * rows["probe_seconds"] + rows["depth"] * rows["seconds"]
        table.append(
            {
                **dict(zip(IDENTITY, identity, strict=True)),
                "layers": int(rows["layers"].iloc[0]),
                "mean_active": float(learnt.sum() / seconds.sum()),
                "probes": int(rows[PROBE].sum()),
                "switches": int((np.diff(rows["depth"]) != 0).sum()),
                "steps_per_row": float(rows[STEP].iloc[-1] / len(rows)),
                **{f"seconds/{mode}": float(seconds[mode]) for mode in MODES},
            }
        )
    return pd.DataFrame(table)


def relevance_shares(race: Race) -> dict[str, pd.DataFrame]:
    """Each layer's share (columns, the lowest first) of the relevance that a probe found (rows, by train seconds).

    By trial id, of the first seed with probes of every recipe. Probes that are not finite or whose sum is not positive
    are left out.
    """
    rows = layer_rows(race)
    if RELEVANCE not in rows.columns:
        return {}
    found = {}
    for recipe in race.recipes:
        every = rows[rows["recipe"] == recipe].dropna(subset=[RELEVANCE]).sort_values("seed", kind="stable")
        probes = every[every["trial_id"].isin(every["trial_id"].head(1))]
        values = pd.DataFrame(probes[RELEVANCE].tolist(), index=probes[TRAIN_SECONDS], dtype=float).dropna()
        total = values.sum(axis=1)
        if (total > 0).any():
            found[str(probes["trial_id"].iloc[0])] = values[total > 0].div(total[total > 0], axis=0)
    return found


def _timed(rows: pd.DataFrame, layers: float) -> pd.DataFrame:
    """The rows of one run with the columns of `layer_rows`."""
    probe = rows[PROBE] == 1
    # In a run of nothing but probes every layer learns.
    depth = rows[ACTIVE_LAYERS].mask(probe).ffill().bfill().fillna(layers)
    resting = depth < layers
    before, after = ~resting.cummax(), ~resting[::-1].cummax()[::-1]
    mode = np.select([resting, before, after], [RESTING, START, END], BETWEEN)
    elapsed = rows[TRAIN_SECONDS].diff().fillna(rows[TRAIN_SECONDS])
    in_probe = (elapsed / rows[STEP].diff().fillna(rows[STEP])).where(probe, 0.0)
    return rows.assign(layers=layers, depth=depth, mode=mode, seconds=elapsed - in_probe, probe_seconds=in_probe)
