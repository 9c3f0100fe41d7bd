"""The training loop: yields events; `train` shows them, unless told not to.

The same loop trains a prefix and the methods that it is compared with: same data, same order, same loss, same schedule.

One optimizer step: the reparameterization runs once, packed rows go through the frozen backbone with the prefix in
front, logits are computed where there is a label, and AdamW moves the prefix's parameters. Everything is a function of
the configuration and the step's number, so a resumed run goes on as if nothing had happened.

Knows nothing of what the examples mean.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixtune.attention.forward import gradient_checkpointing
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import BackboneLike, as_backbone, load_backbone
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.data import Example, ExampleLike
from prefixtune.errors import ConfigError, TrainingError
from prefixtune.prefix.prefix import Prefix
from prefixtune.training.baselines import Tuning, tune
from prefixtune.training.checkpoint import PREFIX_FILE, STATE_FILE, WEIGHTS_FILE, Event, read_state
from prefixtune.training.checks import check_together
from prefixtune.training.config import TrainConfig, stored_config
from prefixtune.training.data import read_data
from prefixtune.training.distributed import ProcessGroup, init_distributed, shard
from prefixtune.training.loop import PendingStep, TrainLoop, forward_backward, stop_requests
from prefixtune.training.progress import show_training
from prefixtune.utils.console import Console
from prefixtune.utils.locks import claim_folder
from prefixtune.utils.options import as_config

__all__ = ["TrainResult", "train", "train_together"]


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves.

    Attributes:
        prefix: The best prefix (on the development file, where there is one), baked; None: the method trains weights.
        path: The artifact, of the prefix or the weights.
        steps: Optimizer steps taken.
        best_loss: Lowest development loss, per token; NaN without a development file.
        num_trained: Parameters that the optimizer moved.
        events: Everything that was logged.
    """

    prefix: Prefix | None
    path: Path
    steps: int
    best_loss: float
    num_trained: int
    events: tuple[Event, ...]


def train(
    config: TrainConfig | Mapping[str, Any] | None = None,
    *,
    backbone: BackboneLike | None = None,
    examples: Sequence[ExampleLike] | None = None,
    dev_examples: Sequence[ExampleLike] | None = None,
    resume: bool = False,
    progress: bool = True,
    on_event: Callable[[Event], None] | None = None,
    processes: ProcessGroup | None = None,
    **options: Any,
) -> TrainResult:
    """Train a prefix and store it in `config.output`.

    A folder that holds a run already is refused, unless that is resumed.

    Args:
        config: The run: a `TrainConfig`, or a dict of its fields.
        backbone: A `Backbone` or a (model, tokenizer) pair, which a method that trains weights changes; a name or path
            stands for `config.backbone`; None: `config.backbone` is loaded.
        examples: `Example`s, or dicts: such as `{"source": "...", "target": "..."}`, or records where `config.source`
            is given; None: `config.train` is read.
        dev_examples: Likewise; None: `config.dev` is read, if given.
        resume: Go on from the state in `config.output`, with losses equal to those of an uninterrupted run. With more
            `max_steps` (or `epochs`, `patience`) than before, the run is extended: from here on, the learning rate is
            that of a run planned with the new number of steps. Without `config`, the run's own is taken, with the
            options over it.
        progress: Show on stderr how the run goes.
        on_event: Called with every event, as it happens; in the first process alone.
        processes: The processes that share the work; None: those that this one was started with, by `torchrun` or
            `accelerate launch`. All of them must see the output folder. The losses are those of one process with the
            same batch size; a run may be resumed with another number of processes.
        **options: Fields of `TrainConfig`, in place of `config`.

    Raises:
        CheckpointError: There is no run to resume.
        ConfigError: A contradiction in the configuration, or with the state to resume; an argument of a wrong type; or
            the folder holds a run already.
        DataError: The data cannot be read or does not fit.
        TrainingError: The loss is not finite; the last good state is kept.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the state is saved.
    """
    config = _chosen(config, options, resume=resume)
    if isinstance(backbone, str | os.PathLike):
        config, backbone = config.replace(backbone=os.fspath(backbone)), None
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(init_distributed(config.device)) if processes is None else processes
        console = Console(quiet=not (progress and processes.is_main))
        show = stack.enter_context(show_training(console))
        _claim([config], processes, stack)
        # Before the backbone loads.
        states = [read_state(config)] if resume else []
        data = read_data(config, examples, dev_examples, processes, resume=resume, loads=backbone is None)
        if backbone is None:
            console.info(f"loading {config.backbone} ...")
        loaded = _load(config, processes) if backbone is None else as_backbone(backbone)
        run = _make_run(config, loaded, data, processes)
        # Not kept: it may be as large as the model.
        events: list[Event] = run.resume(*states.pop()) if states else []
        stopping = stack.enter_context(stop_requests())
        stack.enter_context(gradient_checkpointing(run.backbone.model, config.gradient_checkpointing))
        for event in run.events(stopping, fresh=not resume):
            events.append(event)
            show(event)
            if on_event is not None and processes.is_main:
                on_event(event)
        return _result(run, events)


def _chosen(config: TrainConfig | Mapping[str, Any] | None, options: Mapping[str, Any], *, resume: bool) -> TrainConfig:
    """The run that is meant; one that is resumed without a configuration has its own, with the options over it."""
    if resume and config is None:
        return TrainConfig.from_toml(stored_config(options.get("output", TrainConfig.output)), **options)
    return as_config(TrainConfig, config, options)


def train_together(
    configs: Sequence[TrainConfig],
    *,
    backbone: Backbone | None = None,
    examples: Sequence[Sequence[Example] | None] | None = None,
    dev_examples: Sequence[Sequence[Example] | None] | None = None,
    resume: bool = False,
    on_event: Callable[[Event], None] | None = None,
    processes: ProcessGroup | None = None,
) -> list[TrainResult]:
    """Train several prefixes at once: the same as one after the other, but every pass over the backbone serves all.

    Each run has its own data, length, start, rate and seed, and its own folder, as if it were trained alone; its
    gradients are those that it has alone, but for rounding. A run whose steps are taken, or whose loss is not finite,
    leaves the others to go on.

    Args:
        configs: The runs. They share the backbone and its dtype.
        backbone: Already loaded; None: the one that they all name is loaded.
        examples: Per run, already read; None: its `train` is read.
        dev_examples: Per run, already read; None: its `dev` is read, if given.
        resume: Go on from the states in the folders; what is done stays as it is.
        on_event: Called with every event, with the run's folder added as `run`.
        processes: As in `train`.

    Raises:
        ConfigError: The runs cannot share a pass, or one of them is wrong.
        DataError: The data cannot be read or does not fit.
        TrainingError: A loss was not finite; the other runs have ended well.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the states are saved.
    """
    check_together(configs)
    given = examples or [None] * len(configs), dev_examples or [None] * len(configs)
    events: list[list[Event]] = []
    failed: list[TrainingError] = []
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(init_distributed(configs[0].device)) if processes is None else processes
        _claim(configs, processes, stack)
        # A run that was stopped before its first save begins anew.
        begun = [resume and (Path(config.output) / STATE_FILE).exists() for config in configs]
        # Before the backbone loads.
        states = [read_state(config) for config, old in zip(configs, begun, strict=True) if old]
        data = [
            read_data(config, some, dev, processes, resume=resume, loads=backbone is None)
            for config, some, dev in zip(configs, *given, strict=True)
        ]
        backbone = backbone or _load(configs[0], processes)
        if not backbone.layout.packable:
            raise ConfigError(
                f"{backbone.name!r} takes no packed rows, so that its runs cannot share a pass.",
                hint="train them one after the other.",
            )
        runs = [_make_run(config, backbone, each, processes) for config, each in zip(configs, data, strict=True)]
        if any(run.labels is not None and run.labels.by == "head" for run in runs):
            raise ConfigError("a head is trained alone.", hint="use classifier = 'words', or train it by itself.")
        events = [run.resume(*states.pop(0)) if old else [] for run, old in zip(runs, begun, strict=True)]

        def tell(number: int, event: Event) -> None:
            events[number].append(event)
            if on_event is not None and processes.is_main:
                on_event({**event, "run": str(runs[number].folder)})

        stopping = stack.enter_context(stop_requests())
        stack.enter_context(gradient_checkpointing(backbone.model, configs[0].gradient_checkpointing))
        going = {
            number: stack.enter_context(contextlib.closing(run.steps(stopping, fresh=not begun[number])))
            for number, run in enumerate(runs)
        }
        while going:
            pendings: list[PendingStep] = []
            for number, steps in list(going.items()):
                try:
                    pending = _until_pending(steps, functools.partial(tell, number))
                except TrainingError as error:
                    failed.append(error)
                    pending = None
                if pending is None:
                    del going[number]
                else:
                    pendings.append(pending)
            if pendings:
                forward_backward(backbone, pendings)
        if stopping.is_set():
            raise KeyboardInterrupt("the states are saved")
        if failed:
            raise failed[0]
        return [_result(run, found) for run, found in zip(runs, events, strict=True)]


def _until_pending(steps: Iterator[Event | PendingStep], tell: Callable[[Event], None]) -> PendingStep | None:
    """Let a run go on to where something is to be computed for it; None: it has ended."""
    for told in steps:
        if isinstance(told, PendingStep):
            return told
        tell(told)
    return None


def _claim(configs: Sequence[TrainConfig], processes: ProcessGroup, stack: contextlib.ExitStack) -> None:
    """Let nobody else train in the runs' folders meanwhile; said before anything is read or loaded.

    Raises:
        PrefixError: Another process does, or a folder cannot be written.
    """
    for config in configs if processes.is_main else ():
        stack.enter_context(claim_folder(Path(config.output)))


def _make_run(
    config: TrainConfig, backbone: Backbone, data: tuple[Sequence[Example], Sequence[Example]], processes: ProcessGroup
) -> TrainLoop:
    """A run on a backbone that can carry it."""
    if not config.trains_prefix:
        backbone = tune(backbone, Tuning(config.method, config.method_size), seed=config.seed)
    if config.gradient_checkpointing and not backbone.layout.forwards_kwargs:
        raise ConfigError(
            f"{backbone.name!r} hands no argument down to its attention: recomputed layers would lose the prefix.",
            hint="train without gradient_checkpointing.",
        )
    return TrainLoop(config, backbone, *data, processes)


def _load(config: TrainConfig, processes: ProcessGroup) -> Backbone:
    """The backbone of a run, where this process computes."""
    backbone = load_backbone(
        config.backbone,
        dtype=config.dtype,
        # Layer by layer, what is split moves from here to where it is computed.
        device="cpu" if config.shard else processes.device or config.device,
        quantize=config.quantize,
        adapter=config.adapter or None,
        train_adapter=config.train_adapter,
        adapter_rank=config.adapter_rank,
    )
    if config.shard:
        shard(backbone.model)
    return backbone


def _result(run: TrainLoop, events: Sequence[Event]) -> TrainResult:
    """What a run leaves."""
    path = run.folder / (PREFIX_FILE if run.config.trains_prefix else WEIGHTS_FILE)
    # The first process has written it.
    run.processes.barrier()
    return TrainResult(
        load_prefix(path) if run.config.trains_prefix else None,
        path,
        run.step,
        run.best_loss,
        sum(parameter.numel() for parameter in run.trained),
        tuple(events),
    )
