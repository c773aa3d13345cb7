"""Reads the JSON that runs leave behind, measures it, draws it and writes the report; needs neither torch nor Ray."""

from __future__ import annotations

from analysis.frames import Race, read_race
from analysis.layers import layer_measures, relevance_shares
from analysis.measures import (
    comparison,
    ledger_check,
    loss_at_time,
    loss_at_tokens,
    mean_interval,
    order_check,
    run_measures,
    time_to_loss,
)
from analysis.report import summary_table, write_report

__all__ = [
    "Race",
    "comparison",
    "layer_measures",
    "ledger_check",
    "loss_at_time",
    "loss_at_tokens",
    "mean_interval",
    "order_check",
    "read_race",
    "relevance_shares",
    "run_measures",
    "summary_table",
    "time_to_loss",
    "write_report",
]
