"""What a reader of a report needs to know of its columns; text alone."""

from __future__ import annotations

VERDICT_NOTES = """\
A verdict in bold is a claim that the data support; everything else is none. Every arm is held against {baseline}, pair
by pair of one seed.

* **difference**: mean over pairs{ratios}
* **final loss**: at the end of the budget, that is, at equal time.{speeds}
* **95 % interval**: Student's t, of this row alone.
* **p (Holm)**: {tests}
* **detectable**: the smallest true difference that a t test of so many pairs of this spread finds with a chance of
  80 %, at the strictest step of the correction; of a ratio, a factor above 1 and its inverse. A smaller one would
  have been missed more often. Which differences the data speak against is said by the interval, not by this column."""

RATIO_NOTE = "; for tokens/s and speed-up the geometric mean of the ratios, above 1 for the arm."

SPEED_NOTES = """\
 **tokens/s**: tokens read, whether or not they
  carried a gradient: faster reading is not faster learning. **speed-up to a common loss**: {baseline}'s train seconds
  over the arm's to the lowest loss that all runs of both reached. **≤**, **≥**, **?**: {baseline}, the arm, or both had
  met it by a first milestone, and when is not known: a bound, without an interval."""

SET_SECONDS_NOTE = """\
 The seconds of this race were set, a
  fixed time a step, not measured: equal time is equal steps, and speeds are not judged."""

TEST_NOTES = """\
by {tests}; corrected over all arms{family}, so that a race without any difference claims
  one in at most {percent} % of cases.{then}"""

SPEED_UP_NOTE = """\
 The speed-up is corrected over the arms, and claimed only where the final loss
  is, to the same side: faster with better, slower with worse. Its p is never below that of the final loss, and 1 where
  the two are on different sides; what is detectable of it leaves the final loss out."""

UNTESTED_NOTE = "none: no arm has two pairs with figures, so nothing was tested and nothing is claimed."

COLUMN_NOTES = """\
* **finished**: runs that used their whole budget, of those started. Only they enter this table.
* **final val loss**: mean next-token loss on held-out documents at the end of the budget, that is, at equal time.
* **difference to baseline**: final val loss minus that of the baseline run of the same seed; below zero is better.
  **†**: no claim that the data support; see the verdicts.
* **val loss at equal tokens**: interpolated at {tokens} million tokens seen, the most that every finished run reached.
  Where the learning rate decays with the budget, a run that ends there has decayed and is held against runs that have
  not: this favours whoever reads slowest.
* **time to baseline's final loss**: train seconds until the run first gets to the final val loss of the baseline run of
  its seed, interpolated between milestones, and at most those of its first one if it was there by then; "reached by k
  of n" if some pairs never got there. Whoever gets there does so within the baseline's time: no speed-up can be read
  off it.
* **tokens seen, tokens/s**: tokens read from the stream, padding left out, whether or not they carried a gradient;
  per train second. **epochs**: how often the training documents were read. **steps**: optimizer updates.
* **peak memory**: most allocated on the device in training and validation, pools of CUDA graphs included; of the runs
  that measured it.
* **±**: half width of the 95 % Student t interval over seeds (over pairs for differences and times); without it there
  was one run only.

Train seconds are training plus waiting for data; nothing else counts against the budget."""

MILESTONE_NOTES = """\
Means over finished runs, ± the half width of a 95 % t interval; in brackets the difference to the baseline, paired by
seed. Columns are milestones in mean train seconds, at most a step late, or quarters of the tokens that every run has
seen, interpolated between milestones and left out where no recipe has figures. Intervals are not corrected for their
number: before the end they are figures, not claims."""

SCORE_NOTES = """\
More is better. One score of each task is judged: the first that it has of {primary}; the others are figures.
**difference**, **p (Holm)** and **detectable** are as for the verdicts; the judged scores are a family of their own,
corrected over all arms and tasks together. A difference, its interval and ± are over seeds, on the same fixed
questions: how other questions would turn out is not in them. A run's own interval is over its n questions, and wider
where these are few.

* **questions**: those that were answered within the task's seconds.
* **valid solutions**: samples, right or wrong, that hold an answer of the form that is asked for.
* **truncated**: the part of the samples that neither ended by themselves nor at a stop string.
* **disagreements**: samples that math-verify and the second check judge differently; each is in the run's folder
  `evaluation/`, with both verdicts."""

TARGET_NOTES = """\
Targets are losses that the slowest baseline run had reached at {fractions} % of its seconds. Cells: mean train
seconds, then the speed-up against the baseline with its 95 % interval (geometric mean over pairs). "k of n": only k of
n runs got there; the others would have taken longer than they ran, so the speed-up, with their whole time in its place,
is at most (≤) what is shown. A target met by a first milestone is dated to it, here and in the profile: the seconds are
at most (≤) what is shown, and the speed-up is at least that (≥), at most if it was the baseline's, and either (?) if
both. Intervals are each cell's own, not corrected; a bound has none.

The profile counts, over all targets and seeds, how often a recipe was within a factor of the fastest recipe's time
(arXiv:2306.07179); area is that below the share from 1x to 4x, 1.00 for a recipe that is always the fastest. Seeds are
those for which every recipe's run ended; a run that diverged or failed reaches nothing. The baseline's finished runs
reach all targets by construction, others need not. Targets of a seed lie on one curve: the shares describe these runs
and are no sample of tasks."""

EFFICIENCY_NOTES = """\
What it takes an arm to get to the lowest loss that all its runs and the baseline's reached; geometric means over pairs
with 95 % intervals. Where a run had met that loss by its first milestone, there are bounds instead: ≤ for the
baseline's, ≥ for the arm's, ? for both.

* **speed-up**, **token efficiency**: the baseline's seconds, and tokens, over the arm's.
* **kept**: the part r of the labelled positions that carried a gradient up to there. This column and those of a kept
  token's worth are for arms that choose positions for the loss; others have no such figure. Columns in which no arm has
  one are left out.
* **value of a kept token**: the baseline's tokens over the arm's kept ones. **break-even**: the train seconds of a kept
  token over those of a baseline token; speed-up = value / break-even. (1+2r)/(3r) is the break-even of a step whose
  backward pass costs only what is kept.
* **value against** tokens kept by chance: what the choice itself was worth. 1x is nothing; a smaller batch has a value
  of its own against the baseline, that of `fewer_rows` being its token efficiency.
* **peak memory**: over the baseline's."""

SATURATION_NOTES = """\
Change of the validation loss from three quarters of the run's train seconds to its end, and the same per minute; ± over
seeds. Where the learning rate decays with the budget, the fall of the last quarter includes what the decay brings. What
still falls has not shown what a longer budget would give."""

LAYER_NOTES = """\
Runs in which a layer ever rested, and those with probes: where nothing rested, such a run was full training.

* **layers that learn**: mean over train seconds, probes included.
* **probes**: steps in which every layer learns and its relevance is measured.
* **switches**: changes of the number of layers that learn, between steps that are no probes.
* **full at the start, between, at the end**: seconds in which every layer learns, probes left out: before some rest for
  the first time, in the midst, and after they rested for the last time (recovery).
* **steps a row**: a logged row speaks for the steps since the row before it, a probe for itself alone. Above 1.0 the
  seconds are estimates, and switches are those in the log: more may have happened."""
