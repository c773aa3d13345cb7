"""Evaluation: the tasks of a race, run at its milestones or later, and what stays on disk of them.

    <run>/evaluation/<milestone as 0.500>/<task>.jsonl    one question a line: key, answer, and every sample with what
                                                          was extracted, what both checks say, whether it was truncated
    <run>/milestones/<milestone as 0.500>/                the weights then, as a Hugging Face folder with its tokenizer

A task's measures are `eval/<task>/<measure>` of the milestone's row. They are of the questions that were answered
before the task's time cap; `n` says how many. Judging comes after it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cggr_ray.codec import Plain
from cggr_ray.data.sources import Source
from cggr_ray.evaluation.aime import Aime
from cggr_ray.evaluation.estimates import Overlap
from cggr_ray.evaluation.generate import check_prompts, fill, generate
from cggr_ray.evaluation.generated import Generated
from cggr_ray.evaluation.gsm8k import Gsm8k
from cggr_ray.evaluation.task import FileTask, Question, Sample, Task, Verdict
from cggr_ray.files import copy_whole, write_whole
from cggr_ray.out_of_memory import with_fewer
from cggr_ray.saying import Say, silent
from cggr_ray.schema import EVAL, EVALUATION_FOLDER, QUESTIONS_FOLDER

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

AnyTask = Generated | Gsm8k | Aime
# A task's name is part of a metric's name and of a file's.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Evaluation(Plain):
    """What is asked at a race's milestones.

    `rows` samples are generated at once. `keep_models` writes the weights of every milestone, from which
    `cggr-ray evaluate` answers other tasks later.
    """

    tasks: tuple[AnyTask, ...]
    rows: int = 64
    keep_models: bool = True

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"evaluation.tasks {names}; accepted: at least one, each with a name of its own")
        for name in names:
            if not NAME.fullmatch(name):
                raise ValueError(f"task name {name!r}; accepted: letters, digits, '_', '-' and '.'")
        if self.rows < 1:
            raise ValueError(f"evaluation.rows = {self.rows}; accepted: at least 1")

    def check_race(self, milestones: Sequence[float], sources: Sequence[Source]) -> None:
        """Raises ValueError where a race trains on a task's questions, or two milestones would share a folder."""
        self.check_sources(sources)
        names = [milestone_name(fraction) for fraction in {*milestones, 1.0}]
        if len(set(names)) < len(names):
            raise ValueError(f"milestones {list(milestones)}; accepted: with evaluation, a thousandth or more apart")

    def check_sources(self, sources: Sequence[Source]) -> None:
        """Raises ValueError where a task's questions are trained on."""
        for task in self.tasks:
            task.apart_from(sources)

    def check(self) -> None:
        """Looks at every task's files, before anything is started."""
        for task in self.tasks:
            task.check()

    def keep(self, folder: Path) -> None:
        """Copies the tasks' files into a race's folder, which can then be moved without them."""
        for task in self.tasks:
            if isinstance(task, FileTask) and not (kept := kept_file(folder, task)).is_file():
                kept.parent.mkdir(exist_ok=True)
                copy_whole(Path(task.path), kept)

    def kept_in(self, folder: Path) -> Evaluation:
        """The same, with the files that `folder` keeps in place of those they were copied from."""
        return replace(self, tasks=tuple(_kept(folder, task) for task in self.tasks))

    def overlaps(self, sources: Sequence[Source]) -> dict[str, Any]:
        """By task, the questions of which a document of the sources has some words in a row; reads every document."""
        asked = {task: task.load() for task in self.tasks}
        seen = {task: Overlap(questions, task.OVERLAP_WORDS) for task, questions in asked.items()}
        for document in (document for source in sources for document in source.documents()):
            for overlap in seen.values():
                overlap.read(f"{document.prompt}\n{document.completion}")
        return {
            task.name: {"questions": len(asked[task]), "words": task.OVERLAP_WORDS, "keys": sorted(overlap.found)}
            for task, overlap in seen.items()
        }

    def asked(self, tokenizer: PreTrainedTokenizerBase, config: Any) -> list[tuple[Task, list[Question]]]:
        """Every task with its questions.

        Raises:
            ValueError: a task cannot be read, or needs more positions than a model of this configuration has.
        """
        found: list[tuple[Task, list[Question]]] = [(task, task.load()) for task in self.tasks]
        for task, questions in found:
            check_prompts(config, tokenizer, questions, task)
        return found


class Suite:
    """The tasks with their questions, for one tokenizer.

    Args:
        config: the model's Hugging Face configuration.
        folder: the run's.
        say: told where memory ran out and a task was asked again, fewer questions at once.

    Raises:
        ValueError: what `Evaluation.asked` says.
    """

    def __init__(
        self,
        spec: Evaluation,
        tokenizer: PreTrainedTokenizerBase,
        config: Any,
        folder: Path,
        say: Say = silent,
    ) -> None:
        self._tokenizer, self._rows, self._folder = tokenizer, spec.rows, folder / EVALUATION_FOLDER
        self._say = say
        self._asked = spec.asked(tokenizer, config)

    def run(self, model: PreTrainedModel, milestone: str) -> dict[str, float]:
        """Answers every task; returns `eval/<task>/<measure>` and writes the samples. `milestone` names the folder."""
        found: dict[str, float] = {}
        for task, questions in self._asked:
            ask = partial(generate, model, self._tokenizer, questions, task)
            self._rows, samples = with_fewer(self._rows, ask, self._say)
            answered = [(question, given) for question, given in zip(questions, samples, strict=True) if given]
            verdicts = [[task.judge(question, sample) for sample in given] for question, given in answered]
            write_records(self._folder / milestone / f"{task.name}.jsonl", answered, verdicts)
            measures = task.measures(verdicts, [given for _, given in answered])
            found |= {f"{EVAL}/{task.name}/{measure}": value for measure, value in measures.items()}
        return found

    def fill(self, model: PreTrainedModel) -> None:
        """Every task's largest batch at its full length: the memory that `run` may need at most."""
        for task, questions in self._asked:
            fill(model, self._tokenizer, questions, task, self._rows)


def kept_file(folder: Path, task: FileTask) -> Path:
    """Where a race's folder keeps the file of a task: of its format, so with its endings."""
    return folder / QUESTIONS_FOLDER / f"{task.name}{''.join(Path(task.path).suffixes)}"


def _kept(folder: Path, task: AnyTask) -> AnyTask:
    if not isinstance(task, FileTask) or not (kept := kept_file(folder, task)).is_file():
        return task
    return replace(task, path=str(kept.resolve()))


def milestone_name(fraction: float) -> str:
    """The folder of a milestone: 0.5 of the budget is `0.500`."""
    return f"{fraction:.3f}"


def write_records(
    path: Path, answered: Sequence[tuple[Question, Sequence[Sample]]], verdicts: Sequence[Sequence[Verdict]]
) -> None:
    """One line a question; the file is whole or absent, and replaces one of an earlier evaluation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for (question, samples), given in zip(answered, verdicts, strict=True):
        judged = [asdict(sample) | asdict(verdict) for sample, verdict in zip(samples, given, strict=True)]
        record = {"key": question.key, "answer": question.answer, "samples": judged}
        lines.append(json.dumps(record, allow_nan=False) + "\n")
    write_whole(path, "".join(lines))
