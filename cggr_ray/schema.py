"""Every metric name, its unit, and the rows that a run writes to disk. Standard library only.

A run folder holds

    run.json        what ran: recipe, race, seeds, model, data, device, versions (written before the first step), and
                    in `earlier` other devices, hosts and versions with which it ran before it went on from a
                    checkpoint here
    metrics.jsonl   one JSON object a line, append-only: `step`, `milestone`, `resumed`, `adopted` and `out_of_memory`
                    rows, the last of a step or, without train/micro_rows, of a milestone; one that was resumed
                    from an older checkpoint than its last says why in `message`, and rows before an adopted one
                    are those of its `donor`, with whose weights the run goes on
    progress.f64    train seconds at which every step began: little-endian float64, 8 bytes a step
    summary.json    how it ended: status, ledgers, tokens, final validation (written last)
    failure.json    of a race's trial that failed every time it was started: which, and why; gone when it begins again
    run.lock        held by the process that writes here, and who that was last
    checkpoints/    the last two, safetensors and JSON
    evaluation/     of a race with evaluation tasks: <milestone>/<task>.jsonl, every question with its samples, and
                    late.jsonl, milestone rows of what was asked after the run, merged into the others by their step
    milestones/     of such a race: <milestone>/, the weights then as a Hugging Face folder, and milestone.json

and a race folder holds race.json, runs/<trial id>/ and, with evaluation tasks, overlap.json: which of their questions
training documents have, and questions/, the tasks' files. That of a tuning holds tuning.json, runs/<trial id>/,
tuning.jsonl with a row a trial, and the race it leads to. The file `stop` in one of these asks its runs to end with a
checkpoint; run.lock in one is held by the process that starts them; mirror.id is there and in its mirror, if it has
one, which holds the same files but what is Ray's, and data/manifest.json, the sizes and hashes of data/. Readers need
nothing else.

A sweep's folder holds sweep.json (what is searched, and how), runs/<trial id>/, best/ with the best recipe and a race
of it, and sweep.jsonl: one event a line, append-only, `at` in Unix seconds.

    trial       trial_id, values: a draw
    result      trial_id, train_seconds, tokens_seen, val/loss: a validation that the scheduler saw
    exploit     trial_id, donor, generation, values: it goes on with the weights of another, and with these values
    generation  generation: a population goes on to it
    end         trial_id, status, val/loss, train_seconds, tokens_seen, peak_memory_mib, message; once a trial
    session     the sweep began, or was taken up again

Statuses: finished; stopped by the scheduler; diverged; out_of_memory, where peak_memory_mib is what it asked for;
failed; cut, as the sweep's own budget was used up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

RUN_FILE: Final = "run.json"
METRICS_FILE: Final = "metrics.jsonl"
PROGRESS_FILE: Final = "progress.f64"
SUMMARY_FILE: Final = "summary.json"
FAILURE_FILE: Final = "failure.json"
LOCK_FILE: Final = "run.lock"
STOP_FILE: Final = "stop"
RACE_FILE: Final = "race.json"
OVERLAP_FILE: Final = "overlap.json"
RUNS_FOLDER: Final = "runs"
SWEEP_FILE: Final = "sweep.json"
SWEEP_EVENTS_FILE: Final = "sweep.jsonl"
BEST_FOLDER: Final = "best"
TUNING_FILE: Final = "tuning.json"
TUNING_ROWS_FILE: Final = "tuning.jsonl"
TUNED_FILE: Final = "tuned.toml"
CALIBRATION_FILE: Final = "calibration.json"
CALIBRATED_FILE: Final = "calibrated.toml"
EVALUATION_FOLDER: Final = "evaluation"
QUESTIONS_FOLDER: Final = "questions"
LATE_FILE: Final = "late.jsonl"
MILESTONES_FOLDER: Final = "milestones"
MILESTONE_FILE: Final = "milestone.json"
DATA_FOLDER: Final = "data"
# Of a run: what is large, and nobody needs who only reads results.
WEIGHTS_FOLDERS: Final = ("checkpoints", "model", "heads", MILESTONES_FOLDER)
# The word by which a race's folder and its mirror know each other.
MIRROR_FILE: Final = "mirror.id"
# In a trial's last report: why its mirror lacks the end of it.
UNMIRRORED: Final = "unmirrored"

RowKind = Literal["step", "milestone", "resumed", "adopted", "out_of_memory"]
Status = Literal["finished", "diverged", "stopped", "failed", "out_of_memory", "cut"]
SweepEvent = Literal["trial", "result", "exploit", "generation", "end", "session"]


@dataclass(frozen=True)
class Metric:
    """One metric: its name as it appears in JSONL, W&B and TensorBoard, its unit and what it says."""

    name: str
    unit: str
    meaning: str


# What every row carries: where in the budget it was taken.
KIND: Final = "kind"
STEP: Final = "step"
FRACTION: Final = "fraction"
TRAIN_SECONDS: Final = "train_seconds"
WALL_SECONDS: Final = "wall_seconds"
TOKENS_SEEN: Final = "tokens_seen"

# A training loss of selected positions is not comparable between recipes; only val/* is.
TRAIN_LOSS: Final = "train/loss"
KEPT_LOSS: Final = "train/loss_kept_positions"
SKIP_LOSS: Final = "train/loss_thinned_forward"
AUXILIARY_LOSS: Final = "train/loss_auxiliary"
TOKENS_PER_SEC: Final = "train/tokens_per_sec"
SAMPLES_PER_SEC: Final = "train/samples_per_sec"
LEARNING_RATE: Final = "train/learning_rate"
GRAD_NORM: Final = "train/grad_norm"
GRAD_NORM_LAYERS: Final = "train/grad_norm_by_layer"
TOKEN_LOSS: Final = "train/token_loss_dist"
STEP_SECONDS: Final = "train/step_seconds"
MICRO_ROWS: Final = "train/micro_rows"
VAL_LOSS: Final = "val/loss"
VAL_NATS_PER_BYTE: Final = "val/nats_per_byte"
VAL_TOKENS: Final = "val/labelled_tokens"
# Of a milestone: eval/<task>/<measure>, with eval/<task>/n questions and, of a share, <measure>_low and <measure>_high,
# the ends of its 95 % interval.
EVAL: Final = "eval"
GPU_MEMORY: Final = "system/gpu_memory_allocated"
GPU_MEMORY_PEAK: Final = "system/gpu_memory_peak"
# Of a summary, and of the end of a sweep's trial.
PEAK_MEMORY: Final = "peak_memory_mib"
GPU_UTILIZATION: Final = "system/gpu_utilization"
ROUTER_ENTROPY: Final = "router/entropy"
ROUTER_CONFIDENCE: Final = "router/confidence"
ROUTER_KEPT_FRACTION: Final = "router/kept_fraction"
ROUTER_SCORES: Final = "router/difficulty_score_dist"
ROUTER_USAGE: Final = "router/expert_usage"
ROUTER_SPEARMAN: Final = "router/spearman"
ROUTER_RECALL: Final = "router/recall_at_k"
ROUTER_ACTIVE_PARAMS: Final = "router/active_params"
ACTIVE_LAYERS: Final = "updates/active_layers"
PROBE: Final = "updates/probe"
RELEVANCE: Final = "updates/relevance"
ORDER_ROWS: Final = "data/order_rows"
ORDER_HASH: Final = "data/order_hash"
DATA_WAIT_SECONDS: Final = "data/wait_seconds"

METRICS: Final = tuple(
    Metric(*entry)
    for entry in (
        (STEP, "steps", "optimizer updates so far"),
        (FRACTION, "1", "used part of the budget, 0 to 1; of a step when it began, which its schedules read"),
        (
            TRAIN_SECONDS,
            "s",
            "train + data wait: the clock of the budget, when the step ended; of a milestone, when it was taken",
        ),
        (
            WALL_SECONDS,
            "s",
            "since the run began, everything included but what was lost with a killed process, and pauses",
        ),
        (TOKENS_SEEN, "tokens", "positions read from the stream, padding left out"),
        (TRAIN_LOSS, "nats/token", "mean negative log-likelihood of all labelled positions of the step; full recipes"),
        (KEPT_LOSS, "nats/token", "the same, weighted, over kept positions alone; recipes that select"),
        (SKIP_LOSS, "nats/token", "mean over all labelled positions, most of which skipped layers; recipes that skip"),
        (AUXILIARY_LOSS, "nats/token", "what is minimised beyond the next-token loss of the step, with its weights"),
        (TOKENS_PER_SEC, "tokens/s", "tokens seen per train second since the last row, or since the run went on"),
        (SAMPLES_PER_SEC, "rows/s", "packed rows per train second since the last row, or since the run went on"),
        (LEARNING_RATE, "1", "learning rate of the hidden matrices"),
        (GRAD_NORM, "1", "norm of the gradient before clipping, of all parameters; what GaLore projects, in its bases"),
        (GRAD_NORM_LAYERS, "1", "the same of every layer, the lowest first; 0 at rest"),
        (TOKEN_LOSS, "nats/token", "histogram of the losses of single positions, where computed: {edges, counts}"),
        (STEP_SECONDS, "s", "mean train seconds a step since the last row, or since the run went on"),
        (MICRO_ROWS, "rows", "rows of a micro-batch from here on, where memory ran out with more of them"),
        (VAL_LOSS, "nats/token", "mean next-token loss on held-out documents, labelled positions"),
        (VAL_NATS_PER_BYTE, "nats/byte", "the same, per byte of labelled text: comparable between tokenizers"),
        (VAL_TOKENS, "tokens", "labelled positions of the validation"),
        (GPU_MEMORY, "MiB", "allocated on the device when the row was written"),
        (
            GPU_MEMORY_PEAK,
            "MiB",
            "largest allocation since training began or went on, or since generation at the last milestone",
        ),
        (GPU_UTILIZATION, "%", "share of the last sample period with a kernel running, as NVML says"),
        (ROUTER_ENTROPY, "nats", "mean entropy of the scored positions"),
        (ROUTER_CONFIDENCE, "1", "mean largest probability of the scored positions"),
        (
            ROUTER_KEPT_FRACTION,
            "1",
            "kept / labelled positions, the mean of the steps since the row before, or since the run went on; with "
            "buckets of depth, of (position, layer) pairs",
        ),
        (ROUTER_SCORES, "score", "histogram of the difficulty scores: {edges, counts}"),
        (ROUTER_USAGE, "positions", "kept, by bin of the difficulty scores; with buckets of depth, by bucket"),
        (ROUTER_SPEARMAN, "1", "rank correlation of a router's scores with the model's own, on steps that compare"),
        (
            ROUTER_RECALL,
            "1",
            "share of the positions that top-k of the model's own scores keeps, found by the router's",
        ),
        (ROUTER_ACTIVE_PARAMS, "parameters", "parameters that get a gradient this step"),
        (ACTIVE_LAYERS, "layers", "layers that learn in this step"),
        (PROBE, "1", "1 in a step that measures every layer's relevance, else 0"),
        (RELEVANCE, "relevance", "of every layer, the lowest first, as the recipe measures it"),
        (ORDER_ROWS, "rows", "rows read when data/order_hash was taken"),
        (ORDER_HASH, "hex", "chained hash of the first data/order_rows rows: equal for all trials of a race"),
        (DATA_WAIT_SECONDS, "s", "seconds the step path has waited for data so far"),
    )
)

# Metrics whose value is {edges, counts}, both over the same bins.
HISTOGRAMS: Final = (ROUTER_SCORES, TOKEN_LOSS)

# A step has one of these.
STEP_LOSSES: Final = (TRAIN_LOSS, KEPT_LOSS, SKIP_LOSS)

LEDGERS: Final = (
    "train",
    "data_wait",
    "evaluation",
    "checkpoint",
    "reporting",
    "warm_up",
    "set_up",
    "idle",
)
BUDGET_LEDGERS: Final = ("train", "data_wait")

# A summary, key by key (summary.json):
#   trial_id, recipe, seed, status          str, str, int, Status
#   steps, tokens_seen, labelled_tokens     int; labelled positions of all rows that were read, kept or not
#   epochs                                  {source: float}, how often its training documents were read
#   budget_seconds, train_seconds           float; train_seconds is train + data_wait
#   overrun_seconds, last_step_seconds      float; overrun is what training used past the budget, 0 where less
#   wall_seconds                            float, from a clock of its own
#   ledgers                                 {ledger: seconds}, the eight of LEDGERS
#   skipped_steps                           int; had no finite gradient, and changed nothing
#   val/loss, val/nats_per_byte, eval/...   float, of the final milestone; best_val_loss the smallest of all
#   last_good                               {metric: value} of the last milestone with a finite val/loss, and its
#                                           fraction; null where there was none
#   peak_memory_mib                         float, of training and validation, or null without a GPU; of worker 0
#   parameters                              int
#   micro_rows, out_of_memory               int; rows of a micro-batch at the end, how often memory ran out before
#   order                                   {rows: hash}, the marks of data/order_hash
#   activation_cache                        {hits, misses}: micro-batches, where there is a cache
#   message                                 str, why it did not finish

BENCH_COLUMNS: Final = (
    "bench",
    "shape",
    "provider",
    "dtype",
    "gpu",
    "torch",
    "triton",
    "commit",
    "ms_p20",
    "ms_p50",
    "ms_p80",
    "peak_mib",
    "value",
    "unit",
)
