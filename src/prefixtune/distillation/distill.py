"""Distill: read, load, make questions and answers, label them, train, report; each phase is kept and can be resumed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import BackboneLike
from prefixtune.data.encoding import TokenizedExample, format_of
from prefixtune.distillation.config import DistillConfig
from prefixtune.distillation.inputs import check_output, read_jobs
from prefixtune.distillation.preparation import Preparation
from prefixtune.distillation.report import report
from prefixtune.distillation.teacher import check_teacher
from prefixtune.errors import ConfigError
from prefixtune.prefix.prefix import Prefix
from prefixtune.training.beside import SELF
from prefixtune.training.distributed import is_main_process
from prefixtune.training.prepare import backbone_of, check_named, prepare
from prefixtune.training.progress import show_training
from prefixtune.training.run import Run, TrainResult
from prefixtune.training.run_folder import STATE_FILE, Event
from prefixtune.training.silence import bare_texts
from prefixtune.training.together import train_together
from prefixtune.training.train import train
from prefixtune.utils.console import Console
from prefixtune.utils.files import claim_folder, write_text

__all__ = ["DistillResult", "distill", "open_memory"]

_TOGETHER = 8
"""Documents that share a pass over the backbone."""


@dataclass(frozen=True)
class DistillResult:
    """A memory.

    Attributes:
        name: Of its document; empty: there is one memory only.
        prefix: The memory.
        path: Its file.
        report: What it knows, as `distill.json` in its folder holds it.
    """

    name: str
    prefix: Prefix
    path: Path
    report: dict[str, Any]


def distill(
    config: DistillConfig | Mapping[str, Any] | None = None,
    *,
    backbone: BackboneLike | None = None,
    resume: bool = False,
    progress: bool = True,
    on_event: Callable[[Event], None] | None = None,
    **options: Any,
) -> list[DistillResult]:
    """Put a document, a prompt or a teacher into a prefix.

    Args:
        config: The run: a `DistillConfig`, or a dict of its fields.
        backbone: A `Backbone` or a (model, tokenizer) pair; None: `config.backbone` is loaded.
        resume: Go on with the distillation in `config.output`, from where it was stopped, with the same result. Without
            `config`, its own is used, with the options over it.
        progress: Show the progress on stderr.
        on_event: Called with every event of the training.
        **options: Fields of `DistillConfig`, in place of `config`.

    Returns:
        One memory per document.

    Raises:
        CheckpointError: There is no distillation to resume.
        ConfigError: A contradiction in the configuration, or the folder holds a run already.
        DataError: A document, a prompt or questions cannot be read, or do not fit.
        BackboneError: The teacher has another tokenizer, or the backbone cannot do the job.
        TrainingError: A loss was not finite.
        KeyboardInterrupt: Ctrl-C or SIGTERM; what was made is kept.
    """
    config = DistillConfig.of_call(config, options, resume=resume)
    if not is_main_process():
        raise ConfigError("distill runs in one process.", hint="start it without torchrun.")
    console = Console(quiet=not progress)
    jobs = read_jobs(config, resume=resume)
    if config.beside == SELF and len(jobs) == 1:
        raise ConfigError("beside is 'self', but there is one memory.", hint="give a folder of several documents.")
    check_named(config.training, begun=resume)
    check_teacher(config)
    config, student = backbone_of(config, backbone, console)
    preparation = Preparation(config, jobs, student, console)
    root = Path(config.output)
    if not resume:
        with claim_folder(root):
            # Another one may have begun there since.
            check_output(root)
            write_text(root / config.file_name, config.to_toml())
    for memory in preparation.memories:
        # The training claims the folder itself, afterwards.
        with claim_folder(memory.job.output):
            preparation.make_questions(memory)
    results = _train(config, preparation, student, console, on_event, resume=resume)
    finished, texts = list[DistillResult](), list[TokenizedExample]()
    for memory, result in zip(preparation.memories, results, strict=True):
        assert result.prefix is not None
        if config.document and config.max_steps and not texts:
            texts = bare_texts(student, format_of(student, result.prefix), result.prefix.length())
        figures = report(config, memory, student, result, console, texts)
        finished.append(DistillResult(memory.job.name, result.prefix, result.path, figures))
    if resume:
        # A later `resume` without options goes on as this one did.
        write_text(root / config.file_name, config.to_toml())
    return finished


@contextlib.contextmanager
def open_memory(config: DistillConfig, student: Backbone, console: Console) -> Iterator[Run]:
    """Make one memory ready to train: its questions, answers and labels are made, or read if they are kept.

    Args:
        config: What is put into the prefix; goes on if the folder of `output` has been begun.
        student: The backbone of the group.
        console: Shows the progress; what it raises ends the work, and what is complete by then is kept.

    Yields:
        The run. Once it has ended, `distill.json` in its folder says what it was made of, without a reading of what it
        knows, for which the model would have to be run again.

    Raises:
        CheckpointError: The folder's distillation was begun with something else, or a file of it is damaged.
        ConfigError: A contradiction in the configuration.
        DataError: A document or questions cannot be read, or do not fit.
        BackboneError: The teacher has another tokenizer, or the backbone cannot do the job.
    """
    check_teacher(config)
    preparation = Preparation(config, read_jobs(config, resume=True), student, console)
    (memory,) = preparation.memories
    folder = memory.job.output
    with claim_folder(folder):
        write_text(folder / config.file_name, config.to_toml())
        preparation.make_questions(memory)
    with prepare(memory.run, student, memory.examples, resume=True, teach=preparation.label) as run:
        yield run
        if run.loop.ended:
            report(config, memory, student, run.result(), None)


def _train(
    config: DistillConfig,
    preparation: Preparation,
    student: Backbone,
    console: Console,
    on_event: Callable[[Event], None] | None,
    *,
    resume: bool,
) -> Iterator[TrainResult]:
    """Train all memories; those of several documents share passes."""
    memories, size = preparation.memories, _TOGETHER if student.layout.packable and not config.adapter else 1
    size = len(memories) if config.beside == SELF else size
    for first in range(0, len(memories), size):
        group = memories[first : first + size]
        with show_training(console, on_event, num_runs=len(group)) as show:
            shared: dict[str, Any] = {"backbone": student, "on_event": show, "teach": preparation.label}
            if len(group) > 1:
                examples = [memory.examples for memory in group]
                results = train_together([one.run for one in group], examples=examples, resume=resume, **shared)
            else:
                begun = (group[0].job.output / STATE_FILE).exists()
                results = [train(group[0].run, examples=group[0].examples, resume=begun, progress=False, **shared)]
        yield from results
