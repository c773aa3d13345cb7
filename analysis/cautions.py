"""What speaks against a race: missing runs, time or order that does not add up, arms that were not tuned alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.frames import Race
from analysis.judging import devices
from analysis.measures import FAR, FINISHED, comparison, epochs, ledger_check, order_check, saturation, stability
from analysis.stats import spread_factors
from analysis.tables import figure, plain
from cggr_ray.schema import KEPT_LOSS, VAL_LOSS
from cggr_ray.tried import at_the_edge, untuned

# Ledgers that miss the wall clock by more than this many percent leave time unexplained.
CLOSURE_PERCENT = 0.5
# Passes over the same documents after which new ones would be worth much more.
FRESH_EPOCHS = 4
# No question has more words: so many in a row are all of it.
WHOLE_QUESTION = 1000


def unfinished(race: Race) -> list[str]:
    """Why runs did not finish, and which trials of the race left no run at all."""
    messages = race.runs.get("message", pd.Series("", index=race.runs.index))
    lines = [
        f"{run} ({status}): {' '.join(message.split()) if isinstance(message, str) and message else 'no message'}"
        for run, status, message in zip(race.runs["trial_id"], race.runs["status"], messages, strict=True)
        if status != FINISHED
    ]
    return lines + [f"{trial}: never started" for trial in never_started(race)]


def never_started(race: Race) -> list[str]:
    """Ids of the trials of the race that left no run."""
    return [str(trial) for trial in race.spec.get("trials", ()) if trial not in set(race.runs["trial_id"])]


def ledger_words(race: Race) -> str:
    """Whether the ledgers add up to the wall clock, and how far training overran its budget."""
    checks = ledger_check(race)
    worst = checks["difference_percent"].abs().max()
    if race.stepped:
        closure = "The clock advanced by a fixed time a step: the ledgers cannot add up to the wall clock."
    elif len(checks) == 0 or checks["difference_percent"].isna().any():
        closure = "Ledgers or wall clock are missing for some runs, so they cannot be said to add up."
    elif worst > CLOSURE_PERCENT:
        closure = f"**The ledgers miss the wall clock by up to {worst:.2f} %: time is unexplained.**"
    else:
        within = max(math.ceil(1000 * worst), 1) / 1000
        closure = f"The eight ledgers add up to the wall clock within {within:.3f} % in {_every(race, len(checks))}."
    overrun = checks["overrun_steps"].max()
    late = f" Training used at most {overrun:.2f} last steps beyond the budget." if not pd.isna(overrun) else ""
    return f"{closure}{late} Seconds; the budget is the sum of the columns marked *."


def stability_words(race: Race) -> str:
    """Which runs had gradients far beyond their usual norm, and which skipped steps."""
    runs = stability(race)
    wild = runs[runs["far"] > 0]
    shares = ", ".join(f"{run} in {100 * far:.2g} %" for run, far in zip(wild["trial_id"], wild["far"], strict=True))
    beyond = f"radient norms beyond {FAR:g} times their median after the first tenth of the budget"
    words = f"**G{beyond}: {shares} of the logged steps.**" if shares else f"No run logged g{beyond}."
    if runs["median"].isna().all():
        words = "No run logged gradient norms."
    skipped = runs[runs["skipped_steps"] > 0]
    counts = zip(skipped["trial_id"], skipped["skipped_steps"], strict=True)
    without = ", ".join(f"{int(n)} of {run}" for run, n in counts)
    lost = f" **Steps without a finite gradient took their time and changed nothing: {without}.**" if without else ""
    return f"{words}{lost} Norms are taken before clipping."


def order_words(race: Race) -> str:
    """Whether all runs read the same rows."""
    agree = order_check(race)["agree"]
    every = _every(race, len(agree))
    if (agree == False).any():  # noqa: E712 - nullable booleans
        return "**Runs of one data seed read different rows: their losses cannot be compared as pairs.**"
    if agree.isna().any() or len(agree) == 0:
        return "Some runs could not be compared: no other run of their data seed has a mark at as many rows."
    same = "read the same rows in the same order as the other runs of its data seed, at every mark compared"
    return f"{every.capitalize()} {same}."


def _every(race: Race, checked: int) -> str:
    """Of whom a check of so many runs speaks: of one that has not ended nothing is known yet."""
    runs = len(race.runs)
    return "every run" if checked == runs else f"every run that ended ({checked} of {runs})"


def tuning_words(race: Race) -> str:
    """How the arms were tuned before the race, in a sentence; an arm without any of the values tried was not."""
    spec = race.spec.get("spec", {})
    tuning = spec.get("tuning")
    if tuning is None:
        return "By the race's file no arm was tuned before the race."
    arms, tried = spec.get("arms", {}), tuning["values"]
    names = list(spec.get("recipes", race.recipes))
    left = untuned(names, arms, tried)
    if len(left) == len(names):
        return "The race's file describes a tuning, but no arm has any of its values: no arm was tuned for this race."
    keys = "; ".join(f"{key} = {plain([entry[key] for entry in tried])}" for key in tried[0])
    together = " (varied together)" if len(tried[0]) > 1 else ""
    words = (
        f"By the race's file each arm had {len(tried)} trials of {plain(tuning['seconds'])} train seconds, seed "
        f"{tuning['seed']}, over {keys}{together}, before the race; it races with one of the values tried."
    )
    words += f" **Not so {', '.join(left)}: none of these values.**" if left else ""
    tuned = [name for name in names if name not in left]
    edges = [f"{name} ({own})" for name in tuned if (own := _edges(arms[name], tried))]
    beyond = f" **At the edge of what was tried, so that a better value may lie beyond: {', '.join(edges)}.**"
    return words + beyond if edges else words


def _edges(values: Mapping[str, Any], tried: Sequence[Mapping[str, Any]]) -> str:
    return "; ".join(f"{key} = {plain(values[key])}, the {end}" for key, end in at_the_edge(values, tried).items())


def caveats(race: Race) -> list[str]:
    """What the figures of a race cannot say."""
    notes = [
        *pair_caveats(race),
        *device_caveats(race),
        "Every recipe ran with the learning rate in the table of settings; one that was tuned less well looks worse.",
        "Time to a loss is interpolated linearly between milestones: late on a convex curve, within one spacing.",
        "Schedules end with the budget: milestones and targets before the end compare runs that have not decayed yet, "
        "and losses at equal tokens compare runs that have with runs that have not.",
    ]
    if VAL_LOSS in race.milestones.columns:
        notes.append("Every loss is on the same held-out text: the spread over seeds leaves out that of other text.")
    if race.runs.get("data_seed", pd.Series()).nunique() == 1:
        notes.append("All runs share one order of the data: the spread over seeds leaves out that of the order.")
    if race.stepped:
        notes.append(
            "**The clock advanced by a fixed time a step: seconds and tokens/s are not those of any machine.**"
        )
    if (race.runs.get("gpus_per_trial", pd.Series(dtype=float)) < 1).any():
        notes.append(
            "**Runs shared a GPU with others: their speeds, and losses at equal seconds, are not comparable.**"
        )
    if short := _with_some(race, "out_of_memory"):
        runs = "run" if len(short) == 1 else "runs"
        words = "went on with smaller micro-batches, and lost time by it."
        notes.append(f"{len(short)} {runs} ran out of memory ({', '.join(short)}), {words}")
    notes += calibration_caveats(race)
    if resumed := _with_some(race, "resumes"):
        runs = "run was" if len(resumed) == 1 else "runs were"
        words = "steps after it were done again, and only the second time counts."
        notes.append(f"{len(resumed)} {runs} taken up again from a checkpoint ({', '.join(resumed)}): {words}")
    notes += moved_caveats(race)
    return notes + version_caveats(race) + data_caveats(race)


def _with_some(race: Race, count: str) -> list[str]:
    """Ids of the runs that have counted more than none of something."""
    counts = race.runs.get(count, pd.Series(0, index=race.runs.index))
    return list(race.runs.loc[counts > 0, "trial_id"])


def device_caveats(race: Race) -> list[str]:
    """How far the figures are those of one device."""
    seeds: dict[str, set[int]] = {}
    if "device/name" in race.runs.columns:
        for seed, names in zip(race.runs["seed"], devices(race.runs), strict=True):
            for name in names:
                seeds.setdefault(name, set()).add(int(seed))
    if len(seeds) < 2:
        return ["One budget, one model and one device: a ranking can turn over at another of either."]
    where = "; ".join(f"{name}: seed {', '.join(map(str, sorted(own)))}" for name, own in seeds.items())
    return [
        "One budget and one model: a ranking can turn over at another of either.",
        f"**Runs were on different devices ({where}): means over seeds and their ± mix them, in tokens/s and in losses "
        "at equal time. Only differences of pairs on one device do not.**",
    ]


def calibration_caveats(race: Race) -> list[str]:
    """Runs on another device than micro-batches were calibrated on: they need not be the largest that fit there."""
    calibration = race.spec.get("spec", {}).get("calibration")
    if not calibration or "device/name" not in race.runs.columns:
        return []
    elsewhere = sorted(set().union(*devices(race.runs)) - {calibration["device"]["name"]})
    there = f"Micro-batches were calibrated on {calibration['device']['name']}, and runs were on {', '.join(elsewhere)}"
    return [f"**{there}: there they need not be the largest that fit.**"] if elsewhere else []


def version_caveats(race: Race) -> list[str]:
    """Software that was not the same in all runs, and whether it was within the pairs."""
    names = [str(name) for name in race.runs.columns if str(name).startswith("versions/")]
    mixed = [name for name in names if race.runs[name].nunique() > 1]
    within = [name for name in mixed if (race.runs.groupby("seed")[name].nunique() > 1).any()]
    between = ", ".join(name.removeprefix("versions/") for name in mixed if name not in within)
    notes = []
    if within:
        paired = ", ".join(name.removeprefix("versions/") for name in within)
        notes.append(f"**Runs of one seed had different versions of {paired}: their difference may come of it.**")
    if between:
        notes.append(f"**Seeds had different versions of {between}; the runs of a pair had the same.**")
    return notes


def moved_caveats(race: Race) -> list[str]:
    """Runs that were not on one machine, or not of one version, all along: where they were, and what is another."""
    if "earlier" not in race.runs.columns:
        return []
    notes = []
    for run in race.runs[race.runs["earlier"].notna()].to_dict("records"):
        here = f"{run['device/name']} of {run['process/host']}"
        before = [f"{where['device']} of {where['host']}" for where in run["earlier"]]
        if away := [place for place in dict.fromkeys(before) if place != here]:
            words = f"was moved in its midst, from {', '.join(away)} to {here}: its speed is neither's."
            notes.append(f"**{run['trial_id']} {words}**")
        known = [where.get("versions", {}).items() for where in run["earlier"]]
        if changed := sorted({name for old in known for name, had in old if had != run.get(f"versions/{name}")}):
            words = f"has changed in its midst: {', '.join(changed)}."
            notes.append(f"**What {run['trial_id']} ran with {words}**")
    return notes


def pair_caveats(race: Race) -> list[str]:
    """How little the fewest pairs of an arm say; nothing where there is nobody to compare with."""
    if len(race.recipes) == 1:
        return []
    rows = comparison(race)
    fewest = int(rows.loc[rows["recipe"] != race.baseline, "pairs"].min())
    if fewest > 1:
        low, high = spread_factors(fewest)
        return [
            f"The smallest comparison has {fewest} pairs, which tell their own spread within a factor of {low:.2g} to "
            f"{high:.2g} only (95 %): its interval can be narrow, and what is detectable small, by luck. Both assume a "
            "roughly normal spread."
        ]
    return ["A recipe with fewer than two pairs has no interval; its difference may be the luck of one seed."]


def data_caveats(race: Race) -> list[str]:
    """The same, of what was read and learnt."""
    notes = []
    table = saturation(race)
    falling = table.loc[table["change"] + table["change_half_width"] < 0, "recipe"]
    if len(falling):
        notes.append(f"Still falling at the end of the budget: {', '.join(falling)}. A longer one may rank otherwise.")
    most = {recipe: max(passes.values(), default=0.0) for recipe, passes in epochs(race).items()}
    if max(most.values(), default=0.0) > FRESH_EPOCHS:
        passes = ", ".join(f"{recipe} {figure(number, 1)}" for recipe, number in most.items())
        notes.append(
            f"Documents were read more often than about {FRESH_EPOCHS} times ({passes}), beyond which they teach "
            "little (arXiv:2305.16264) and more tokens a second turn into memorising: more data may change the ranking."
        )
    for task, seen in race.spec.get("overlap", {}).items():
        share = f"{len(seen['keys'])} of {seen['questions']} questions of {task} are whole in a training document"
        words = "" if seen["words"] >= WHOLE_QUESTION else f", or {seen['words']} words of them in a row"
        notes += [f"{share}{words}."] if seen["keys"] else []
    if KEPT_LOSS in race.steps.columns:
        notes.append("Training loss of recipes that select is over kept positions and compares with no other recipe's.")
    return notes
