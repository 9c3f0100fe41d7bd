"""Train: read the data, load the backbone, tokenize, build the encoder, run the loop, return the artifact."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prefixtune.backbone.load import BackboneLike
from prefixtune.data import ExampleLike
from prefixtune.training.config import TrainConfig
from prefixtune.training.distributed import ProcessGroup, init_distributed
from prefixtune.training.loop import TrainLoop
from prefixtune.training.prepare import Teach, prepare
from prefixtune.training.progress import show_training
from prefixtune.training.run import TrainResult, stop_requests
from prefixtune.training.run_folder import Event
from prefixtune.training.together import train_together
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
    config = TrainConfig.of_call(config, options, resume=resume)
    if isinstance(backbone, str | os.PathLike):
        config, backbone = config.replace(backbone=os.fspath(backbone)), None
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(init_distributed(config.device)) if processes is None else processes
        console = Console(quiet=not (progress and processes.is_main))
        tell = stack.enter_context(show_training(console, on_event if processes.is_main else None))
        shared: dict[str, Any] = {"resume": resume, "teach": teach, "processes": processes, "console": console}
        run = stack.enter_context(prepare(config, backbone, examples, dev_examples, **shared, begin=False))
        if check is not None:
            check(run.loop)
        run.begin()
        stop = stack.enter_context(stop_requests())
        result = run.train(stop, tell)
        if after is not None:
            # A signal in the last step finds a run that is done.
            if stop.is_set():
                raise KeyboardInterrupt("the state is saved")
            after(run.loop, stop)
        return result
