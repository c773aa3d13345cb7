"""Rows of metrics.jsonl as `cggr_ray.schema` describes them, and a summary that is another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def milestone(step: int, seconds: float, tokens: int, loss: float | None, budget: float = 20.0) -> dict[str, Any]:
    position = {"step": step, "fraction": seconds / budget, "train_seconds": seconds, "wall_seconds": 2 * seconds}
    return {"kind": "milestone", **position, "tokens_seen": tokens, "val/loss": loss}


def step_row(step: int, **metrics: Any) -> dict[str, Any]:
    position = {"step": step, "fraction": step / 20, "train_seconds": float(step), "wall_seconds": 2.0 * step}
    return {"kind": "step", **position, "tokens_seen": 100 * step, **metrics}


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def edit_summary(race: Path, trial: str, **changes: Any) -> None:
    path = race / "runs" / trial / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
