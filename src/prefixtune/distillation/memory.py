"""One memory from its configuration to a run that trains beside others; and what all distillations begin with."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.distillation.config import DistillConfig
from prefixtune.distillation.inputs import CONFIG_FILE, REPORT_FILE, Job, read_jobs
from prefixtune.distillation.outcome import describe, training_seconds
from prefixtune.distillation.phases import Lesson, label_data, prepare
from prefixtune.distillation.plan import make_plan
from prefixtune.distillation.teacher import Teacher, load_teacher
from prefixtune.distillation.wording import check_view, choose_wording
from prefixtune.errors import ConfigError, DataError
from prefixtune.prefix.prefix import read_artifact
from prefixtune.training.beside import SELF
from prefixtune.training.config import TrainConfig
from prefixtune.training.data import TrainData
from prefixtune.training.folder import PREFIX_FILE
from prefixtune.training.opening import open_run
from prefixtune.training.runs import Run
from prefixtune.utils.console import Console
from prefixtune.utils.files import claim_folder, write_text

__all__ = ["Teachers", "check_student", "open_memory"]


_MOST_ROWS, _MOST_POSITIONS = 16, 16_384
"""While questions and answers are made beside other runs: rows of a pass, and the positions of texts in view that these
have together."""


@contextlib.contextmanager
def open_memory(config: DistillConfig, student: Backbone, console: Console) -> Iterator[Run]:
    """Make one memory ready to join a `RunGroup`: its questions, answers and labels are made, or read if they are kept.

    Args:
        config: What is put into the prefix; goes on if the folder of `output` has been begun.
        student: The backbone of the group.
        console: Shows the progress; what it raises ends the work, and what is complete by then is kept.

    Yields:
        The run. Once it has ended, `distill.json` in its folder says what it was made of, without a reading of what it
        knows, for which the model would have to be run again.

    Raises:
        CheckpointError: The folder's distillation was begun with something else, or a file of it is damaged.
        ConfigError: A contradiction in the configuration, or there are several documents.
        DataError: A document or questions cannot be read, or do not fit.
        BackboneError: The teacher has another tokenizer, or the backbone cannot do the job.
    """
    jobs = read_jobs(config, resume=True)
    if len(jobs) != 1:
        raise ConfigError(f"{config.document!r} holds {len(jobs)} documents.", hint="give one document.")
    check_student(config, student, jobs)
    teachers = Teachers(config, student, console)
    wording = choose_wording(config, student, teachers.text_format())
    plan = make_plan(config, jobs[0], teachers.readers(), wording, console)
    stored = config.to_toml()
    config = config.replace(batch_size=_rows_in_view(config, student, plan.chunks))
    # The training, which has the batches of the plan, claims the folder itself, afterwards.
    with claim_folder(plan.job.output):
        write_text(Path(config.output) / CONFIG_FILE, stored)
        lesson = prepare(config, plan, student, teachers.load, wording, console)

    def teach(run: TrainConfig, backbone: Backbone, data: TrainData) -> TrainData:
        labelled = label_data(config, lesson, backbone, teachers.load, data, console)
        teachers.free()
        return labelled

    with open_run(lesson.run, student, examples=lesson.examples, teach=teach) as run:
        yield run
        if run.loop.ended:
            _describe(config, lesson, student, run)


def _rows_in_view(config: DistillConfig, student: Backbone, chunks: Sequence[str]) -> int:
    """Questions in one pass: each has a copy of what is in view."""
    longest = max((len(student.encode(chunk)) for chunk in chunks), default=0)
    return max(1, min(config.batch_size, _MOST_ROWS, _MOST_POSITIONS // max(longest, 1)))


def _describe(config: DistillConfig, lesson: Lesson, student: Backbone, run: Run) -> None:
    """Keep what is known of a memory that is trained; others wait for no reading of it."""
    path = lesson.job.output / PREFIX_FILE
    seconds = {**lesson.seconds, "training": training_seconds(run.events)}
    figures = describe(config, lesson, student, read_artifact(path), path, seconds)
    figures["memory"] = path.name
    write_text(lesson.job.output / REPORT_FILE, json.dumps(figures, indent=1, ensure_ascii=False) + "\n")


def check_student(config: DistillConfig, student: Backbone, jobs: list[Job]) -> None:
    """Refuse what needs the backbone to be seen.

    Raises:
        ConfigError: The backbone cannot have a text in view, or cannot train memories beside each other.
        DataError: A document or prompt is shorter than the memory.
    """
    if student.kind == "encoder" or (config.subject != "teacher" and student.kind != "decoder"):
        raise ConfigError(
            f"{student.name!r} is of kind {student.kind!r}, but a {config.subject} is distilled into a decoder-only "
            "model.",
            hint="choose another backbone; encoder-decoders can learn from a --teacher.",
        )
    if config.beside == SELF and not student.layout.packable:
        raise ConfigError(
            f"beside is 'self', but {student.name!r} reads no packed rows, so that documents cannot train together.",
            hint="train them without --beside, or name a folder of finished prefixes.",
        )
    short = {
        job.text_file: count
        for job in jobs
        if job.text and (count := len(student.encode(job.text))) < config.prefix_length
    }
    if short:
        listed = ", ".join(f"{path!r} has {count}" for path, count in list(short.items())[:5])
        raise DataError(
            f"prefix_length is {config.prefix_length}, but of the texts to put into it {listed} tokens.",
            hint="choose a shorter --prefix-length: a memory is to be shorter than its text.",
        )


class Teachers:
    """The teacher of a run, loaded when it is first needed, and let go before the training."""

    def __init__(self, config: DistillConfig, student: Backbone, console: Console) -> None:
        self._config, self._student, self._console = config, student, console
        self._teacher: Teacher | None = None

    def load(self) -> Teacher:
        """The teacher."""
        if self._teacher is None:
            if self._config.teacher:
                self._console.info(f"loading the teacher {self._config.teacher} ...")
            self._teacher = load_teacher(self._config, self._student)
        return self._teacher

    def text_format(self) -> Any:
        """What the teacher was trained with."""
        return self.load().text_format if self._config.teacher else None

    def readers(self) -> list[Backbone]:
        """Who has a text in view: the student, and a model of its own that teaches.

        Raises:
            ConfigError: One of them cannot read a text that is in view.
        """
        teacher = self.load().backbone if self._config.teacher else self._student
        readers = [self._student] if teacher is self._student else [self._student, teacher]
        if self._config.subject != "teacher":
            for reader in readers:
                check_view(reader)
        return readers

    def free(self) -> None:
        """Let the teacher go."""
        self._teacher = None
