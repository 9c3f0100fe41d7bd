"""What a distillation reads, checked before any model is loaded: one job per memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prefixtune.data.examples import SplitName
from prefixtune.data.folders import locate
from prefixtune.data.registry import TASKS, form_that_fits, read_task, resolve_task
from prefixtune.data.streams import read_text
from prefixtune.distillation.config import SELF, DistillConfig
from prefixtune.distillation.documents import (
    MAX_DOCUMENT_BYTES,
    Question,
    find_documents,
    questions_file,
    read_document,
    read_questions,
)
from prefixtune.distillation.teacher import check_teacher
from prefixtune.errors import ConfigError, DataError, check_all
from prefixtune.training.beside import SELF as ALL_OTHERS
from prefixtune.training.checks import early_checks
from prefixtune.training.distributed import SINGLE_PROCESS
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


def read_jobs(config: DistillConfig, *, resume: bool, loads_backbone: bool) -> list[Job]:
    """Read the files, and report every mistake that can be found before a model loads.

    Raises:
        PrefixError: The only mistake; of several, a `ConfigError` that lists them.
    """
    jobs: list[Job] = []
    # The text to start from is read with the documents.
    run = config.replace(initialization="words") if config.initialization == "text" else config
    check_all(
        [
            *([] if resume else [partial(check_output, Path(config.output))]),
            partial(_read, config, jobs, resume),
            partial(check_writable, Path(config.output) / CONFIG_FILE),
            partial(check_teacher, config, loads_backbone=loads_backbone),
            *early_checks(run, SINGLE_PROCESS, has_dev=False, loads_backbone=loads_backbone, together=True),
        ]
    )
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


def _read(config: DistillConfig, jobs: list[Job], resume: bool) -> None:
    output = Path(config.output)
    if config.subject != "document":
        text, questions, test = _all(
            lambda: _read_prompt(config.prompt) if config.prompt else "",
            lambda: _read_inputs(config, config.data, "train"),
            lambda: _read_inputs(config, config.test, "test"),
        )
        jobs.append(Job("", output, config.prompt, text, tuple(questions[: config.limit or None]), tuple(test)))
        return
    files = find_documents(config.document)
    several = Path(config.document).is_dir()
    found: dict[Path, Job] = {}

    def read(file: Path) -> None:
        def rows(path: str) -> list[Question]:
            return read_questions(questions_file(path, file, len(files) > 1)) if path not in ("", SELF) else []

        text, questions, test = _all(
            lambda: read_document(file), lambda: rows(config.questions), lambda: rows(config.test)
        )
        name = file.stem if several else ""
        questions = tuple(questions[: config.limit or None])
        found[file] = Job(name, output / name, str(file), text, questions, tuple(test))

    # A document's own folder in that of the run must be free as well.
    unused = [partial(check_unused, output / file.stem) for file in files if several and not resume]
    check_all([*(partial(read, file) for file in files), *unused])
    jobs.extend(found[file] for file in files)
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
            f"the questions{' of ' + repr(unanswered[0].name) if several else ''} have answers, but those of --test "
            f"({config.test!r}) have none: nothing could be compared with them.",
            hint="give them answers, or leave --test out.",
        )
    if answered and config.teacher:
        raise ConfigError(
            f"teacher is {config.teacher!r}, but the questions have answers already.",
            hint="leave --teacher out, or give questions without answers.",
        )


def _all(*readers: Callable[[], Any]) -> list[Any]:
    """What the readers return; what is wrong with several files is said at once."""
    results: list[Any] = [None] * len(readers)

    def read(index: int) -> None:
        results[index] = readers[index]()

    check_all([partial(read, index) for index in range(len(readers))])
    return results


def _read_prompt(path: str) -> str:
    try:
        return read_text(Path(path), max_bytes=MAX_DOCUMENT_BYTES, needed="some words").strip()
    except DataError as error:
        if "is empty" in error.message:
            raise DataError(f"the prompt {path!r} is empty.", hint="check that it is complete.") from error
        raise


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
