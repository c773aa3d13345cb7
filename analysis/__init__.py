"""Reads the JSON that runs leave behind, measures it, draws it and writes the report; needs neither torch nor Ray.

Public names resolve on first use: reading frames brings neither matplotlib nor scipy with it.
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "Race": "analysis.frames",
    "Sweep": "analysis.sweeps",
    "at_marks": "analysis.scores",
    "at_tokens": "analysis.scores",
    "claims": "analysis.judging",
    "comparison": "analysis.measures",
    "efficiency": "analysis.targets",
    "final_scores": "analysis.scores",
    "importance": "analysis.hyperparameters",
    "layer_measures": "analysis.layers",
    "ledger_check": "analysis.measures",
    "loss_at_time": "analysis.measures",
    "loss_at_tokens": "analysis.measures",
    "mean_interval": "analysis.stats",
    "order_check": "analysis.measures",
    "performance_profile": "analysis.targets",
    "read_race": "analysis.frames",
    "read_sweep": "analysis.sweeps",
    "relevance_shares": "analysis.layers",
    "report_summary": "analysis.output",
    "run_measures": "analysis.measures",
    "saturation": "analysis.measures",
    "stability": "analysis.measures",
    "score_claims": "analysis.scores",
    "summary_table": "analysis.report",
    "target_times": "analysis.targets",
    "time_to_loss": "analysis.measures",
    "verdicts": "analysis.report",
    "write_report": "analysis.output",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'analysis' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
