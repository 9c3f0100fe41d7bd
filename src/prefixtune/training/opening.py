"""Open runs: claim their folders, check, read, load, tokenize, build, and resume or start each of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from prefixtune.attention.forward import gradient_checkpointing
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.devices import choose_device, choose_dtype
from prefixtune.backbone.load import BackboneLike, as_backbone, load_backbone
from prefixtune.data import Example, ExampleLike
from prefixtune.errors import ConfigError
from prefixtune.training.baselines import Tuning, tune
from prefixtune.training.beside import SELF, Beside, load_others
from prefixtune.training.checkpoint import Checkpoint, read_checkpoint
from prefixtune.training.checks import (
    check_given,
    check_hidden_positions,
    check_options,
    check_passes_gradients,
    check_together,
    no_head,
)
from prefixtune.training.config import TrainConfig
from prefixtune.training.data import TrainData, does_hold_out, is_large_file, read_data, tokenize
from prefixtune.training.distributed import SINGLE_PROCESS, ProcessGroup, shard_model
from prefixtune.training.folder import (
    EVENTS_FILE,
    STATE_FILE,
    Event,
    read_events,
    write_config,
    write_log,
)
from prefixtune.training.forms import check_form, describe_run_data, describe_windows, settle_form
from prefixtune.training.loop import TrainLoop
from prefixtune.training.runs import Run, check_steps
from prefixtune.training.starts.build import build_encoder
from prefixtune.training.trackers import tracking
from prefixtune.utils.config import DTypeName
from prefixtune.utils.console import Console
from prefixtune.utils.files import claim_folder, line_writer

__all__ = ["Inputs", "Teach", "open_run", "open_runs", "with_backbone"]


Teach = Callable[[TrainConfig, Backbone, TrainData], TrainData]
"""Gives a run's tokenized data a teacher's labels; the backbone is the student's."""

Inputs = tuple[Sequence[ExampleLike] | None, Sequence[ExampleLike] | None]
"""A run's examples and development examples, as callers have them."""

_ConfigT = TypeVar("_ConfigT", bound=TrainConfig)


@contextlib.contextmanager
def open_runs(
    configs: Sequence[TrainConfig],
    backbone: BackboneLike | None,
    inputs: Sequence[Inputs],
    processes: ProcessGroup,
    console: Console,
    *,
    resume: bool,
    together: bool = False,
    teach: Teach | None = None,
    check: Callable[[TrainLoop], None] | None = None,
) -> Iterator[list[Run]]:
    """Make runs ready to train, in this order: claim, read, load, tokenize, build, resume or start.

    Args:
        configs: The runs.
        backbone: As callers have it; None: the one that the runs name is loaded.
        inputs: Per run, its examples.
        processes: Those that share the work.
        console: Says that the backbone is loading.
        resume: The folders hold runs to go on with; together, one that was stopped before its first save starts again.
        together: The runs are to share every pass.
        teach: As in `train`.
        check: As in `train`.
    """
    with contextlib.ExitStack() as stack:
        for config in configs:
            check_options(config, processes, together=together)
        configs = [settle_form(config, given) for config, (given, _) in zip(configs, inputs, strict=True)]
        # Nobody else may train in these folders meanwhile; refused before anything is read or loaded.
        for config in configs if processes.is_main else ():
            stack.enter_context(claim_folder(Path(config.output)))
        checkpoints = [
            read_checkpoint(config)
            if resume and (not together or (Path(config.output) / STATE_FILE).exists())
            else None
            for config in configs
        ]
        # A run that has no state to go on from starts, and only where there is none.
        examples = [
            _read(config, given, processes, console, resume=some is not None)
            for config, given, some in zip(configs, inputs, checkpoints, strict=True)
        ]
        loaded = _open_backbone(configs, backbone, processes, console, together=together)
        if backbone is not None:
            configs = [with_backbone(config, loaded) for config in configs]
        others = [_load_beside(config, loaded) for config in configs]
        loops = []
        for config, pair, some in zip(configs, examples, checkpoints, strict=True):
            stored = None if some is None else some.facts["initialization"]
            data = tokenize(config, loaded, *pair, stored_start=stored, console=console)
            if line := describe_windows(config, pair[0], data.train):
                console.info(line)
            if together and data.has_head:
                raise ConfigError(
                    "a run with a head cannot share a pass.", hint="use classifier = 'words', or train it separately."
                )
            data = data if teach is None else teach(config, loaded, data)
            loops.append(_build_loop(config, data, stored, loaded, processes))
        _stand_beside(loops, others)
        if check is not None:
            for loop in loops:
                check(loop)
        check_steps(loops, checkpoints)
        stack.enter_context(gradient_checkpointing(loaded.model, configs[0].gradient_checkpointing))
        # Checkpoints are dropped one by one: each may be as large as the model.
        logs = [_resume(loop, checkpoints.pop(0)) for loop in loops]
        yield [_open_log(*pair, stack) for pair in zip(loops, logs, strict=True)]


@contextlib.contextmanager
def open_run(
    config: TrainConfig,
    backbone: Backbone,
    *,
    examples: Sequence[ExampleLike] | None = None,
    dev_examples: Sequence[ExampleLike] | None = None,
    teach: Teach | None = None,
) -> Iterator[Run]:
    """Make one run ready to join a `RunGroup`; it goes on if its folder, which is only its own meanwhile, has a state.

    Args:
        config: The run; without gradient checkpointing, which would be that of the whole group.
        backbone: Of the group; of one that reads no packed rows, the run must be alone in it.
        examples: As in `train`.
        dev_examples: As in `train`.
        teach: As in `train`.

    Raises:
        CheckpointError: The state in the folder is broken.
        ConfigError: A contradiction in the configuration, or with the state; or the run cannot share a pass.
        DataError: The data cannot be read or does not fit.
    """
    check_together([config])
    if config.gradient_checkpointing:
        raise ConfigError(
            "gradient_checkpointing is that of all runs of a group, but one run asks for it.", hint="leave it out."
        )
    together = backbone.layout.packable
    begun = (Path(config.output) / STATE_FILE).exists()
    shared: dict[str, Any] = {"resume": together or begun, "together": together, "teach": teach}
    quiet = Console(quiet=True)
    with open_runs([config], backbone, [(examples, dev_examples)], SINGLE_PROCESS, quiet, **shared) as (run,):
        yield run


def _read(
    config: TrainConfig, given: Inputs, processes: ProcessGroup, console: Console, *, resume: bool
) -> tuple[Sequence[Example], Sequence[Example]]:
    """A run's examples and development examples; lines say what is read, and what is held out."""
    if given[0] is None and is_large_file(config.train):
        console.info(f"reading {config.train} ...")
    train, dev = read_data(config, *given, processes, resume=resume)
    for line in describe_run_data(config, train, dev, given=given[0] is not None):
        console.info(line)
    if does_hold_out(config, given[1]):
        sources = "1 source is" if len(dev) == 1 else f"{len(dev)} sources are"
        console.info(f"{sources} held out of training to choose the best prefix by (hold_out)")
    return train, dev


def _open_backbone(
    configs: Sequence[TrainConfig],
    given: BackboneLike | None,
    processes: ProcessGroup,
    console: Console,
    *,
    together: bool,
) -> Backbone:
    """The backbone of the runs, loaded where it is not given, and checked before anything is tokenized."""
    if given is None:
        console.info(f"loading {configs[0].backbone} ...")
    backbone = _load(configs[0], processes) if given is None else as_backbone(given)
    for config in configs:
        if given is not None:
            check_given(config, backbone)
        _check_backbone(config, backbone, together=together)
    return backbone


def with_backbone(config: _ConfigT, backbone: Backbone) -> _ConfigT:
    """The configuration of a run on a backbone that was given, which its folder then names."""
    known = backbone.dtype_name in get_args(DTypeName)
    return config.replace(backbone=backbone.name, dtype=backbone.dtype_name if known else config.dtype)


def _load(config: TrainConfig, processes: ProcessGroup) -> Backbone:
    """The backbone of a run, on the device of this process."""
    device = processes.device or config.device
    backbone = load_backbone(
        config.backbone,
        dtype=choose_dtype(config.dtype, choose_device(device)),
        # A split model moves layer by layer from here to the device that computes.
        device="cpu" if config.shard else device,
        quantize=config.quantize,
        attention=config.attention,
        adapter=config.adapter or None,
        train_adapter=config.train_adapter,
        adapter_rank=config.adapter_rank,
        seed=config.seed,
    )
    if config.shard:
        shard_model(backbone.model)
    return backbone


def _check_backbone(config: TrainConfig, backbone: Backbone, *, together: bool) -> None:
    """Refuse, before anything is tokenized, what a backbone cannot do.

    Raises:
        ConfigError: It passes no gradients, or reads no packed rows, so that several runs cannot share a pass.
    """
    if together and not backbone.layout.packable:
        raise ConfigError(
            f"{backbone.name!r} reads no packed rows, so that its runs cannot share a pass.",
            hint="train them one after the other.",
        )
    check_passes_gradients(backbone)
    check_hidden_positions(config, backbone)
    check_form(config, backbone)


def _build_loop(
    config: TrainConfig,
    data: TrainData,
    stored_start: Mapping[str, Any] | None,
    backbone: Backbone,
    processes: ProcessGroup,
) -> TrainLoop:
    """A loop with what trains in it: an encoder, or the backbone's own weights."""
    if config.trains_prefix:
        encoder, start = build_encoder(
            config,
            backbone,
            head_labels=data.head_labels,
            examples=data.train.examples,
            plan=data.plan,
            stored_start=stored_start,
        )
        return TrainLoop(config, backbone, data, encoder, start.description, processes)
    if data.has_head:
        raise no_head(config)
    backbone = tune(backbone, Tuning(config.method, config.method_size), seed=config.seed)
    return TrainLoop(config, backbone, data, None, {"kind": "backbone"}, processes)


def _load_beside(config: TrainConfig, backbone: Backbone) -> Beside | None:
    """What stands beside a run's prefix; None: nothing, or the other runs."""
    if config.beside in ("", SELF):
        return None
    return Beside.of_prefixes(load_others(config, backbone), backbone.rotation)


def _stand_beside(loops: Sequence[TrainLoop], others: Sequence[Beside | None]) -> None:
    """Give each run what stands beside its prefix."""
    for loop, loaded in zip(loops, others, strict=True):
        if loaded is not None:
            loop.stand_beside(loaded)
        elif loop.config.beside == SELF:
            loop.stand_beside(_other_runs([other for other in loops if other is not loop], loop.backbone))


def _other_runs(loops: Sequence[TrainLoop], backbone: Backbone) -> Beside:
    """The prefixes of other runs, as they are at each step."""
    facts = [(Path(loop.config.output).name, loop.site_lengths, loop.data.digest, loop.config.seed) for loop in loops]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    lengths = [loop.site_lengths for loop in loops]
    return Beside([loop.current_prefix for loop in loops], lengths, backbone.rotation, digest)


def _resume(loop: TrainLoop, checkpoint: Checkpoint | None) -> list[Event]:
    """Bring a loop to a checkpoint and cut its log back to it; returns the log."""
    if checkpoint is None:
        return []
    loop.resume(checkpoint)
    events = read_events(Path(loop.config.output) / EVENTS_FILE, loop.state.step)
    # All processes have read the log before the first one changes it.
    loop.processes.barrier()
    if loop.processes.is_main:
        write_log(loop.config, events)
    return events


def _open_log(loop: TrainLoop, events: list[Event], stack: contextlib.ExitStack) -> Run:
    """A run whose folder is ready: a new one has its configuration, an empty log and a first state."""
    folder = Path(loop.config.output)
    folder.mkdir(parents=True, exist_ok=True)
    # Before anything else is written: a tracker that does not start leaves no run behind.
    trackers = stack.enter_context(tracking(loop))
    if not loop.resumed and loop.processes.is_main:
        write_config(loop.config)
        write_log(loop.config, [])
        # From now on, even a kill can be resumed from.
        loop.save()
    line = stack.enter_context(line_writer(folder / EVENTS_FILE))
    return Run(loop, events, line, trackers)
