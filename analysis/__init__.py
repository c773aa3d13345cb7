"""Reads the JSON that runs leave behind, measures it, draws it and writes the report; needs neither torch nor Ray."""

from __future__ import annotations

from analysis.frames import Race, read_race
from analysis.layers import layer_measures, relevance_shares
from analysis.measures import (
    comparison,
    ledger_check,
    loss_at_time,
    loss_at_tokens,
    order_check,
    run_measures,
    saturation,
    time_to_loss,
)
from analysis.output import write_report
from analysis.report import summary_table, verdicts
from analysis.scores import at_marks, at_tokens, final_scores, score_claims
from analysis.stats import mean_interval
from analysis.targets import efficiency, performance_profile, target_times
from analysis.verdicts import claims

__all__ = [
    "Race",
    "at_marks",
    "at_tokens",
    "claims",
    "comparison",
    "efficiency",
    "final_scores",
    "layer_measures",
    "ledger_check",
    "loss_at_time",
    "loss_at_tokens",
    "mean_interval",
    "order_check",
    "performance_profile",
    "read_race",
    "relevance_shares",
    "run_measures",
    "saturation",
    "score_claims",
    "summary_table",
    "target_times",
    "time_to_loss",
    "verdicts",
    "write_report",
]
