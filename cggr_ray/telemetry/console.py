"""The terminal while a race runs: one live line a trial, or plain lines where nobody watches a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from cggr_ray.schema import FRACTION, KEPT_LOSS, SKIP_LOSS, TOKENS_PER_SEC, TRAIN_LOSS, VAL_LOSS
from cggr_ray.telemetry.tracker import Row

# Characters of a bar, and of the shortest, where a terminal has no room for more.
BAR, SHORTEST_BAR = 24, 4
# More columns than any line has.
ROOM = 1000
# Without a terminal a line is printed at every such part of a trial's budget.
PLAIN_EVERY = 0.25
# The loss of a step, and the word before it: which positions it is of.
SHOWN = {TRAIN_LOSS: "loss", KEPT_LOSS: "kept", SKIP_LOSS: "thinned"}


def terminal() -> Console:
    """Prints a text as it stands: no bracket of a folder's name, or of a value, is markup."""
    return Console(markup=False, emoji=False)


class RaceConsole:
    """Use as a context manager; `show` takes the rows that trials report."""

    def __init__(self, budget_seconds: float, trial_ids: Sequence[str] = (), console: Console | None = None) -> None:
        self._budget, self._console = budget_seconds, console or terminal()
        self._rows: dict[str, Row] = {trial_id: {} for trial_id in trial_ids}
        self._printed: dict[str, float] = {}
        self._live = Live(console=self._console, refresh_per_second=4, get_renderable=self._table)

    def __enter__(self) -> RaceConsole:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def show(self, row: Row) -> None:
        trial_id = str(row["trial"])
        known = self._rows.setdefault(trial_id, {})
        if not SHOWN.keys().isdisjoint(row):
            # A step has one of them: what another step had is not of this one.
            known = self._rows[trial_id] = {name: value for name, value in known.items() if name not in SHOWN}
        known.update({name: value for name, value in row.items() if value is not None})
        if self._console.is_terminal:
            return
        fraction = float(known.get(FRACTION, 0.0))
        if fraction >= 1 or fraction - self._printed.get(trial_id, -1.0) >= PLAIN_EVERY:
            self._printed[trial_id] = fraction
            self._console.print(f"{trial_id:24} {' '.join(self._cells(known))}", highlight=False, soft_wrap=True)

    def _cells(self, row: Row, bar: int = BAR) -> list[str]:
        if FRACTION not in row:
            return ["waiting", "", "", "", ""]
        fraction = float(row[FRACTION])
        filled = round(fraction * bar)
        shown, val = [f"{word} {row[name]:.3f}" for name, word in SHOWN.items() if name in row], row.get(VAL_LOSS)
        return [
            f"|{'=' * filled}{'.' * (bar - filled)}| {fraction:4.0%}",
            "".join(shown),
            f"val {val:.4f}" if val is not None else "",
            f"{row[TOKENS_PER_SEC] / 1e3:.1f}k tok/s" if row.get(TOKENS_PER_SEC) else "",
            f"{(1 - fraction) * self._budget:.0f} s left" if fraction < 1 else "done",
        ]

    def _table(self) -> Table:
        """Bars are as much shorter as the terminal is too narrow."""
        whole = self._grid(BAR)
        wanted = self._console.measure(whole, options=self._console.options.update_width(ROOM)).maximum
        missing = max(0, wanted - self._console.width)
        return self._grid(max(SHORTEST_BAR, BAR - missing)) if missing else whole

    def _grid(self, bar: int) -> Table:
        table = Table.grid(padding=(0, 2))
        for trial_id, row in self._rows.items():
            table.add_row(trial_id, *self._cells(row, bar))
        return table
