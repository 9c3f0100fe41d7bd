"""Train: read the data, load the backbone, tokenize, build the encoder, run the loop, return the artifact."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import BackboneLike
from prefixtune.data import Example, ExampleLike
from prefixtune.training.checks import check_together
from prefixtune.training.config import TrainConfig
from prefixtune.training.distributed import ProcessGroup, init_distributed
from prefixtune.training.folder import Event, stored_config
from prefixtune.training.group import RunGroup
from prefixtune.training.loop import TrainLoop
from prefixtune.training.opening import Teach, open_runs
from prefixtune.training.progress import show_training
from prefixtune.training.runs import TrainResult, stop_requests
from prefixtune.utils.console import Console

__all__ = ["Teach", "TrainResult", "train", "train_together"]


def train(
    config: TrainConfig | Mapping[str, Any] | None = None,
    *,
    backbone: BackboneLike | None = None,
    examples: Sequence[ExampleLike] | None = None,
    dev_examples: Sequence[ExampleLike] | None = None,
    resume: bool = False,
    progress: bool = True,
    on_event: Callable[[Event], None] | None = None,
    check: Callable[[TrainLoop], None] | None = None,
    after: Callable[[TrainLoop, threading.Event], None] | None = None,
    processes: ProcessGroup | None = None,
    teach: Teach | None = None,
    **options: Any,
) -> TrainResult:
    """Train a prefix and store it in `config.output`.

    A folder that already holds a run is refused, unless that run is resumed.

    Args:
        config: The run: a `TrainConfig`, or a dict of its fields.
        backbone: A `Backbone` or a (model, tokenizer) pair, which a method that trains weights changes, and which the
            configuration's options of loading must not contradict; a name or path replaces `config.backbone`; None:
            `config.backbone` is loaded.
        examples: `Example`s, or dicts: such as `{"source": "...", "target": "..."}`, or records where `config.source`
            is set; None: `config.train` is read.
        dev_examples: Likewise; None: `config.dev` is read, if it is set.
        resume: Go on from the state in `config.output`, with losses equal to those of an uninterrupted run. Without
            `config`, the run's own is used, with the options over it; what decides the result must be the same.
        progress: Show the run's progress on stderr.
        on_event: Called with every event, as it happens; in the first process only.
        check: Called before anything is written, when the run is ready to train; what it raises ends the run.
        after: Called when all steps are taken and the artifact is stored, while the backbone is still loaded; with the
            event that Ctrl-C or SIGTERM sets.
        processes: The processes that share the work; None: those that this one was started with, by `torchrun` or
            `accelerate launch`. All of them must see the output folder. The losses are those of one process with the
            same batch size; a run may be resumed with another number of processes.
        teach: Gives the tokenized data a teacher's labels (`TokenizedExample.soft_targets`), before the first step.
        **options: Fields of `TrainConfig`, in place of `config`.

    Raises:
        CheckpointError: There is no run to resume.
        ConfigError: A contradiction in the configuration, or with the state to resume; an argument of a wrong type; or
            the folder holds a run already.
        DataError: The data cannot be read or does not fit.
        TrainingError: The loss is not finite; the last good state is kept.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the state is saved.
    """
    if resume and config is None:
        config = TrainConfig.from_file(stored_config(options.get("output", TrainConfig.default("output"))), **options)
    else:
        config = TrainConfig.from_arguments(config, options)
    if isinstance(backbone, str | os.PathLike):
        config, backbone = config.replace(backbone=os.fspath(backbone)), None
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(init_distributed(config.device)) if processes is None else processes
        console = Console(quiet=not (progress and processes.is_main))
        show = stack.enter_context(show_training(console))
        opened = open_runs(
            [config], backbone, [(examples, dev_examples)], processes, console, resume=resume, teach=teach, check=check
        )
        (run,) = stack.enter_context(opened)
        stop = stack.enter_context(stop_requests())
        for event in run.loop.run(stop):
            run.record(event)
            show(event)
            if on_event is not None and processes.is_main:
                on_event(event)
        # A signal in the last step finds a run that is done.
        if stop.is_set() and (after is not None or not run.loop.ended):
            raise KeyboardInterrupt("the state is saved")
        if after is not None:
            after(run.loop, stop)
        return run.result()


def train_together(
    configs: Sequence[TrainConfig | Mapping[str, Any]],
    *,
    backbone: Backbone | None = None,
    examples: Sequence[Sequence[Example] | None] | None = None,
    dev_examples: Sequence[Sequence[Example] | None] | None = None,
    resume: bool = False,
    on_event: Callable[[Event], None] | None = None,
    processes: ProcessGroup | None = None,
    teach: Teach | None = None,
) -> list[TrainResult]:
    """Train several prefixes at once: the same as one after the other, but every pass over the backbone serves all.

    Each run has its own data, length, start, rate and seed, and its own folder, as if it were trained alone; its
    gradients are those that it has alone, up to rounding. When a run has taken its steps, or its loss is not finite,
    the others go on; but those that a broken prefix stands beside (`beside` = "self") can break with it.

    Args:
        configs: The runs: `TrainConfig`s, or dicts of its fields. They share the backbone and its dtype.
        backbone: Already loaded; None: the one that they all name is loaded.
        examples: Per run, already read; None: its `train` is read.
        dev_examples: Per run, already read; None: its `dev` is read, if it is set.
        resume: Go on from the states in the folders; a run without a state starts, where there is no artifact yet.
        on_event: Called with every event, with the run's folder added as `run`; in the first process only.
        processes: As in `train`.
        teach: As in `train`, called for each run.

    Raises:
        ConfigError: The runs cannot share a pass, or one of them is wrong.
        DataError: The data cannot be read or does not fit.
        TrainingError: A loss was not finite; the other runs are complete.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the states are saved.
    """
    planned = [TrainConfig.from_arguments(config, {}) for config in configs]
    check_together(planned)
    none = [None] * len(planned)
    inputs = list(zip(examples or none, dev_examples or none, strict=True))
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(init_distributed(planned[0].device)) if processes is None else processes
        opened = open_runs(
            planned, backbone, inputs, processes, Console(quiet=True), resume=resume, together=True, teach=teach
        )
        runs = stack.enter_context(opened)
        stop = stack.enter_context(stop_requests())
        group = RunGroup(runs[0].loop.backbone)
        for run in runs:
            group.add(run)
        while group.runs:
            for run, event in group.step(stop):
                run.record(event)
                if on_event is not None and processes.is_main:
                    on_event({**event, "run": str(Path(run.loop.config.output))})
        if stop.is_set() and not all(run.loop.ended for run in runs):
            raise KeyboardInterrupt("the states are saved")
        if group.failed:
            raise group.failed[0][1]
        return [run.result() for run in runs]
