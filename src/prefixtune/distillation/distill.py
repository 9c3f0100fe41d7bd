"""Distill: read, load, make questions and answers, label them, train, report; each phase is kept and can be resumed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import BackboneLike, as_backbone, load_backbone
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.distillation.config import DistillConfig
from prefixtune.distillation.inputs import CONFIG_FILE, REPORT_FILE, Job, check_output, read_jobs
from prefixtune.distillation.memory import Teachers, check_student
from prefixtune.distillation.outcome import report, training_seconds
from prefixtune.distillation.phases import Lesson, label_data, prepare
from prefixtune.distillation.plan import Plan, make_plan
from prefixtune.distillation.wording import Wording, choose_wording
from prefixtune.errors import CheckpointError, ConfigError
from prefixtune.prefix.geometry import spell_lengths
from prefixtune.prefix.prefix import Prefix
from prefixtune.training.config import TrainConfig
from prefixtune.training.data import TrainData
from prefixtune.training.distributed import is_main_process
from prefixtune.training.folder import STATE_FILE, Event
from prefixtune.training.opening import with_backbone
from prefixtune.training.progress import show_training
from prefixtune.training.starts.start import lengths_from
from prefixtune.training.train import TrainResult, train, train_together
from prefixtune.utils.console import Console
from prefixtune.utils.files import claim_folder, write_text
from prefixtune.utils.folders import expand_home

__all__ = ["DistillResult", "distill", "stored_distillation"]

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


def stored_distillation(output: str | Path) -> Path:
    """The configuration that the distillation in a folder was started with.

    Raises:
        CheckpointError: The folder holds none.
    """
    path = expand_home(output) / CONFIG_FILE
    if not path.exists():
        raise CheckpointError(
            f"there is no distillation to resume in {str(path.parent)!r}.",
            hint="name its folder with --output (output), or start it without --resume (resume).",
        )
    return path


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
    if resume and config is None:
        output = options.get("output", DistillConfig.default("output"))
        config = DistillConfig.from_file(stored_distillation(output), **options)
    else:
        config = DistillConfig.from_arguments(config, options)
    if not is_main_process():
        raise ConfigError("distill runs in one process.", hint="start it without torchrun.")
    if resume:
        stored_distillation(config.output)
    console = Console(quiet=not progress)
    jobs = read_jobs(config, resume=resume)
    config = _with_lengths(config)
    if backbone is None:
        student = _load(config, console)
    else:
        student = as_backbone(backbone)
        config = with_backbone(config, student)
    check_student(config, student, jobs)
    teachers = Teachers(config, student, console)
    wording = choose_wording(config, student, teachers.text_format())
    # No name here holds the readers: the teacher is let go before the training.
    plans = _make_plans(config, jobs, teachers.readers(), wording, console)
    root = Path(config.output)
    with contextlib.nullcontext() if resume else claim_folder(root):
        if not resume:
            # Another one may have begun there since.
            check_output(root)
            write_text(root / CONFIG_FILE, config.to_toml())
    lessons = []
    for plan in plans:
        # The training claims the folder itself, afterwards.
        with claim_folder(plan.job.output):
            lessons.append(prepare(config, plan, student, teachers.load, wording, console))
    results = _train(config, lessons, student, teachers, console, on_event, resume=resume)
    finished = [
        _finish(config, lesson, student, result, console) for lesson, result in zip(lessons, results, strict=True)
    ]
    if resume:
        # A later `resume` without options goes on as this one did.
        write_text(root / CONFIG_FILE, config.to_toml())
    return finished


def _with_lengths(config: DistillConfig) -> DistillConfig:
    """The configuration with the lengths of the prefix to start from, where it gives none."""
    if config.initialization != "prefix" or config.prefix_length:
        return config
    actual = load_prefix(config.init_prefix).lengths
    lengths = lengths_from(config.site_lengths or dict.fromkeys(actual, 0), actual)
    return config.replace(prefix_length=max(lengths.values()), sites=spell_lengths(lengths))


def _make_plans(
    config: DistillConfig, jobs: Sequence[Job], readers: Sequence[Backbone], wording: Wording, console: Console
) -> list[Plan]:
    return [make_plan(config, job, readers, wording, console) for job in jobs]


def _load(config: DistillConfig, console: Console) -> Backbone:
    console.info(f"loading {config.backbone} ...")
    return load_backbone(
        config.backbone,
        dtype=config.dtype,
        device=config.device,
        quantize=config.quantize,
        attention=config.attention,
        adapter=config.adapter or None,
    )


def _train(
    config: DistillConfig,
    lessons: list[Lesson],
    student: Backbone,
    teachers: Teachers,
    console: Console,
    on_event: Callable[[Event], None] | None,
    *,
    resume: bool,
) -> Iterator[TrainResult]:
    """Train all memories; those of several documents share passes."""
    waiting = {lesson.run.output: lesson for lesson in lessons}

    def teach(run: TrainConfig, backbone: Backbone, data: TrainData) -> TrainData:
        labelled = label_data(config, waiting.pop(run.output), backbone, teachers.load, data, console)
        if not waiting:
            teachers.free()
        return labelled

    size = len(lessons) if config.beside == "self" else _TOGETHER
    together = student.layout.packable and len(lessons) > 1 and not config.adapter
    for first in range(0, len(lessons), size if together else 1):
        group = lessons[first : first + (size if together else 1)]
        examples = [lesson.examples for lesson in group]
        with show_training(console, num_runs=len(group)) as show:

            def record(event: Event, show: Callable[[Event], None] = show) -> None:
                show(event)
                if on_event is not None:
                    on_event(event)

            shared: dict[str, Any] = {"backbone": student, "on_event": record, "teach": teach}
            if together:
                results = train_together([lesson.run for lesson in group], examples=examples, resume=resume, **shared)
            else:
                begun = (group[0].job.output / STATE_FILE).exists()
                results = [train(group[0].run, examples=examples[0], resume=begun, progress=False, **shared)]
        yield from results


def _finish(
    config: DistillConfig,
    lesson: Lesson,
    student: Backbone,
    result: TrainResult,
    console: Console,
) -> DistillResult:
    """Report on a memory, and keep the report in its folder."""
    assert result.prefix is not None
    lesson.seconds["training"] = training_seconds(result.events)
    figures = report(config, lesson, student, result.prefix, result.path, console)
    write_text(lesson.job.output / REPORT_FILE, json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    return DistillResult(lesson.job.name, result.prefix, result.path, figures)
