"""What a study of a trained model concludes: which speed-ups its loss allows, by a bar that was set before."""

from __future__ import annotations

from collections.abc import Sequence

from cggr_ray.studies.trained import Replaced

# A speed-up worth having, and the part of the full model's loss that it may cost.
SPEED_UP, LOSS_PART = 1.25, 0.005


def conclusions(rows: Sequence[Replaced], full_loss: float, widest: str) -> list[str]:
    """A line for each kind of matrix with a time, the last on the bar: what was published before is a negative result.

    Args:
        widest: the kind that is held to the bar.
    """
    kinds = dict.fromkeys(row.kind for row in rows if row.ms)
    within = f"within {LOSS_PART:.1%} of the loss"
    said, best = [], {}
    for kind in kinds:
        faster = [row for row in rows if row.kind == kind and speed_up(row) > 1]
        allowed = [row for row in faster if row.loss_change <= LOSS_PART * full_loss]
        best[kind] = max(map(speed_up, allowed), default=0.0)
        if allowed:
            said.append(f"{kind}: the fastest {within} is {described(max(allowed, key=speed_up), full_loss)}")
        elif faster:
            nearest = min(faster, key=lambda row: row.loss_change)
            said.append(f"{kind}: nothing faster is {within}; the nearest is {described(nearest, full_loss)}")
        else:
            said.append(f"{kind}: nothing is faster than what it replaces")
    found = "reached: the published negative result does not hold here"
    missed = "not reached: the published negative result holds here"
    return [*said, f"{SPEED_UP}x {within}, {widest} replaced: {found if best[widest] >= SPEED_UP else missed}"]


def speed_up(row: Replaced) -> float:
    """Of the forward of the replaced matrices; 0 where it was not timed."""
    return row.ms_full / row.ms if row.ms and row.ms_full else 0.0


def described(row: Replaced, full_loss: float) -> str:
    return f"{row.method} at {row.fraction:.3g}, {speed_up(row):.2f}x as fast, {row.loss_change / full_loss:+.2%} loss"
