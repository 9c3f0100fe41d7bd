"""What a distillation reads, checked before any model is loaded: one job per memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixtune.data.examples import SplitName
from prefixtune.data.folders import locate
from prefixtune.data.registry import TASKS, form_that_fits, read_task, resolve_task
from prefixtune.distillation.config import SELF, DistillConfig
from prefixtune.distillation.documents import (
    Question,
    find_documents,
    questions_file,
    read_document,
    read_questions,
)
from prefixtune.errors import ConfigError, DataError
from prefixtune.training.beside import SELF as ALL_OTHERS
from prefixtune.training.folder import check_unused
from prefixtune.utils.files import check_writable

__all__ = ["CONFIG_FILE", "REPORT_FILE", "Job", "check_output", "read_jobs"]

CONFIG_FILE, REPORT_FILE = "distill.toml", "distill.json"


@dataclass(frozen=True)
class Job:
    """One memory to make.

    Attributes:
        name: Of the document; empty: there is one memory only.
        output: The folder of its run.
        text_file: The document or the prompt; empty: a teacher alone.
        text: Its text.
        questions: To train on; empty: they are to be made.
        test: Held out, for the report.
    """

    name: str
    output: Path
    text_file: str
    text: str
    questions: tuple[Question, ...]
    test: tuple[Question, ...]

    @property
    def answered(self) -> bool:
        """Whether the questions came with their answers."""
        return bool(self.questions) and all(question.answer is not None for question in self.questions)


def read_jobs(config: DistillConfig, *, resume: bool) -> list[Job]:
    """Read the files: one job per memory.

    Raises:
        ConfigError: The folder holds a run already, or an option does not go with what was read.
        DataError: A file cannot be read.
    """
    if not resume:
        check_output(Path(config.output))
    check_writable(Path(config.output) / CONFIG_FILE)
    jobs = _read_documents(config, resume=resume) if config.subject == "document" else [_read_inputs_alone(config)]
    if config.beside == ALL_OTHERS and (len(jobs) == 1 or config.adapter):
        why = "an adapter is loaded" if config.adapter else "there is only one document"
        raise ConfigError(
            f"beside is 'self', the other documents of this run, but {why}.",
            hint="name a folder of several documents, or a folder of prefixes as --beside.",
        )
    return jobs


def check_output(folder: Path) -> None:
    """Refuse a folder that holds a run or a distillation.

    Raises:
        ConfigError: It does.
    """
    check_unused(folder)
    if (folder / CONFIG_FILE).exists():
        raise ConfigError(
            f"{str(folder)!r} already holds a distillation.",
            hint="go on with --resume (resume=True), choose another --output (output), or delete it.",
        )


def _read_inputs_alone(config: DistillConfig) -> Job:
    """A prompt, or a teacher alone, with its inputs."""
    text = read_document(Path(config.prompt)) if config.prompt else ""
    questions = _read_inputs(config, config.data, "train")[: config.limit or None]
    test = _read_inputs(config, config.test, "test")
    return Job("", Path(config.output), config.prompt, text, tuple(questions), tuple(test))


def _read_documents(config: DistillConfig, *, resume: bool) -> list[Job]:
    """A document, or those of a folder, each with its questions."""
    files = find_documents(config.document)
    several = Path(config.document).is_dir()
    jobs: list[Job] = []
    for file in files:
        folder = Path(config.output) / (file.stem if several else "")
        if several and not resume:
            check_unused(folder)
        questions, test = (
            read_questions(questions_file(path, file, len(files) > 1)) if path not in ("", SELF) else []
            for path in (config.questions, config.test)
        )
        name = file.stem if several else ""
        chosen = tuple(questions[: config.limit or None])
        jobs.append(Job(name, folder, str(file), read_document(file), chosen, tuple(test)))
    _check_answers(config, jobs)
    return jobs


def _check_answers(config: DistillConfig, jobs: Sequence[Job]) -> None:
    """Refuse answers that only some questions have, and a teacher where there are answers."""
    answered = [job for job in jobs if job.answered]
    if answered and len(answered) < len(jobs):
        other = next(job for job in jobs if not job.answered)
        raise DataError(
            f"the questions of {answered[0].name!r} have answers, but those of {other.name!r} have none.",
            hint="give all questions an answer, or none.",
        )
    unanswered = [job for job in answered if any(question.answer is None for question in job.test)]
    if unanswered:
        raise DataError(
            f"the questions have answers, but those of --test ({config.test!r}) have none: nothing could be compared.",
            hint="give them answers, or leave --test out.",
        )
    if answered and config.teacher:
        raise ConfigError(
            f"teacher is {config.teacher!r}, but the questions have answers already.",
            hint="leave --teacher out, or give questions without answers.",
        )


def _read_inputs(config: DistillConfig, path: str, split: SplitName) -> list[Question]:
    """The inputs of a file, or of a folder's split, a target of each as its answer.

    Without a template, their form is recognized.

    Raises:
        DataError: One has several messages, or is a text alone.
    """
    if not path:
        return []
    columns: dict[str, Any] = {"source": config.source or None, "target": config.target or None, "split": split}
    columns["form"] = config.form
    if config.task == "records" and not (config.form or config.source or config.target):
        columns["form"] = form_that_fits(config.task, path, "question", split=split, needs_targets=False)
    _, form, _ = resolve_task(config.task, path, needs_targets=False, **columns)
    if form is not None and form.name == "question":
        task = TASKS[config.task]
        return read_questions(locate(Path(path), split, task.formats, task.release))
    examples = read_task(config.task, path, **columns)
    for number, example in enumerate(examples, start=1):
        if len(example.messages) > 1 or not example.source:
            what = f"has {len(example.messages)} messages" if example.source else "is a text alone"
            raise DataError(
                f"input {number} of {path} {what}; the teacher is asked one question at a time.",
                hint="give questions: rows with prompt or question, and perhaps an answer.",
            )
    return [Question(example.source, target) for example in examples for target in (example.targets or (None,))]
