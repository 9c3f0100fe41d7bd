"""What a distillation reads, checked before any model is loaded: documents, prompts, questions; one job per memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from prefixtune.data.examples import Example, SplitName
from prefixtune.data.files import FORMATS
from prefixtune.data.registry import read_task
from prefixtune.data.streams import read_text
from prefixtune.distillation.config import SELF, DistillConfig
from prefixtune.errors import ConfigError, DataError
from prefixtune.training.run_folder import check_unused
from prefixtune.utils.files import check_writable

_TEXT_ENDINGS = (".txt", ".md", ".rst", ".text")
_MOST_BYTES = 2**24
"""Of a document or a prompt."""


@dataclass(frozen=True)
class Question:
    """A question about a document, or another input.

    Attributes:
        question: As the model is asked.
        answer: None: the teacher is to write it.
        chunk: Which piece of the document it is about, counted from 0.
        kind: What it asks for, if it was made here; else `given`.
        about: The sentence or the name that it was made from; empty: it was given, or is about the whole.
        ended: The answer ends where the target does; False: it was cut at the most tokens of an answer.
    """

    question: str
    answer: str | None = None
    chunk: int = 0
    kind: str = "given"
    about: str = ""
    ended: bool = True


def num_asked(questions: Sequence[Question]) -> int:
    """How many different questions there are: one that has several answers is there with each."""
    return len({question.question for question in questions})


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
    check_writable(Path(config.output) / config.file_name)
    if config.subject == "document":
        return _read_documents(config, resume=resume)
    text = _read_document(Path(config.prompt)) if config.prompt else ""
    data, test = _read_inputs(config, config.data, "train"), _read_inputs(config, config.test, "test")
    return [Job("", Path(config.output), config.prompt, text, data[: config.limit or None], test)]


def check_output(folder: Path) -> None:
    """Refuse a folder that holds a run or a distillation.

    Raises:
        ConfigError: It does.
    """
    check_unused(folder)
    if (folder / DistillConfig.file_name).exists():
        raise ConfigError(f"{str(folder)!r} already holds a distillation.", hint="give --resume, or another --output.")


# --- documents --------------------------------------------------------------------------------------------------------


def _read_documents(config: DistillConfig, *, resume: bool) -> list[Job]:
    """A document, or those of a folder, each with its questions.

    Raises:
        ConfigError: There is a teacher, but all questions have answers.
    """
    files = _find_documents(config.document)
    jobs: list[Job] = []
    for file in files:
        name = file.stem if Path(config.document).is_dir() else ""
        folder = Path(config.output) / name
        if name and not resume:
            check_unused(folder)
        sets: tuple[tuple[str, SplitName], ...] = ((config.questions, "train"), (config.test, "test"))
        questions, test = (
            _read_questions(config, _questions_file(path, file, len(files) > 1), split)
            if path not in ("", SELF)
            else ()
            for path, split in sets
        )
        jobs.append(Job(name, folder, str(file), _read_document(file), questions[: config.limit or None], test))
        if jobs[-1].answered and any(question.answer is None for question in test):
            raise DataError(f"the test questions of {str(file)!r} lack answers.", hint="give them, as to the others.")
    # Where some have none, the teacher writes these.
    if config.teacher and all(job.answered for job in jobs):
        raise ConfigError(f"teacher is {config.teacher!r}, but the questions have answers.", hint="leave one out.")
    return jobs


def _find_documents(path: str) -> list[Path]:
    """The document at a path, or those in a folder, by name.

    Raises:
        DataError: There is none, or two have one name.
    """
    root = Path(path)
    if not root.is_dir():
        return [root]
    files = sorted(file for file in root.iterdir() if file.suffix.lower() in _TEXT_ENDINGS and file.is_file())
    if not files:
        raise DataError(f"{path!r} holds no file that ends with {', '.join(_TEXT_ENDINGS)}.", hint="name a text file.")
    twice = [name for name, count in Counter(file.stem for file in files).items() if count > 1]
    if twice:
        raise DataError(f"the folder {path!r} has two documents {twice[0]!r}.", hint="rename one.")
    return files


def _read_document(path: Path) -> str:
    return read_text(path, max_bytes=_MOST_BYTES, needed="some words").strip()


def _questions_file(path: str, document: Path, several: bool) -> Path:
    """The file with a document's questions: the one that is named, or in a folder the one of the document's name.

    Raises:
        DataError: The folder has no such file, or one file is given for several documents.
    """
    root = Path(path)
    if not root.is_dir():
        if several:
            raise DataError(f"{path!r} is one file for several documents.", hint="name a folder with a file for each.")
        return root
    files = [root / f"{document.stem}{ending}{end}" for ending in FORMATS for end in ("", ".gz")]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise DataError(f"the folder {path!r} has no questions of {document.name!r}.", hint="write a file of its name.")
    return found


# --- questions and inputs ---------------------------------------------------------------------------------------------


def _read_questions(config: DistillConfig, path: Path, split: SplitName) -> tuple[Question, ...]:
    """The questions of a file with `question` and perhaps `answer` or `answers`; a column `context` does not count.

    Where options say how inputs are read, the file is read so.
    """
    if any(getattr(config, name) != config.default(name) for name in ("task", "form", "source", "target")):
        return _read_inputs(config, str(path), split)
    examples = read_task("records", path, split=split, form="question", needs_targets=False)
    return _as_questions([replace(one, source=str(one.fields["question"]).strip()) for one in examples], path)


def _read_inputs(config: DistillConfig, path: str, split: SplitName) -> tuple[Question, ...]:
    """The inputs of a file, or of a folder's split; without a template, their form is recognized."""
    if not path:
        return ()
    columns = {"source": config.source or None, "target": config.target or None, "form": config.form}
    return _as_questions(read_task(config.task, path, split=split, prefer="question", **columns), path)


def _as_questions(examples: Sequence[Example], path: str | Path) -> tuple[Question, ...]:
    """Each example's source with each of its targets as the answer; without any, the teacher is to answer.

    Raises:
        DataError: One has several messages, or is a text alone.
    """
    for number, example in enumerate(examples, start=1):
        if len(example.messages) > 1 or not example.source:
            what = f"has {len(example.messages)} messages" if example.source else "is a text alone"
            raise DataError(f"input {number} of {path} {what}.", hint="give single questions, and perhaps answers.")
    return tuple(Question(example.source, target) for example in examples for target in (example.targets or (None,)))
