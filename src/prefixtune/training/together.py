"""Runs that share every pass over one backbone; they join and leave between steps."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import BackboneLike, as_backbone
from prefixtune.data import Example
from prefixtune.errors import CheckpointError, ConfigError, TrainingError
from prefixtune.training.beside import SELF, Beside
from prefixtune.training.config import TrainConfig
from prefixtune.training.data import read_data
from prefixtune.training.distributed import ProcessGroup, init_distributed
from prefixtune.training.loop import PendingStep, TrainLoop, forward_backward
from prefixtune.training.prepare import Teach, check_named, load_for, prepare
from prefixtune.training.run import Run, TrainResult, stop_requests
from prefixtune.training.run_folder import EARLIER_STATE_FILE, Event, check_unused, has_state
from prefixtune.training.score import MOST_POSITIONS

MOST_POSITIONS_ON_CPU = 1024
"""Of runs that share passes on a processor: larger passes are a little quicker, and take more memory, for SmolLM2-135M
in bfloat16 1.2 MiB a token (research/LOG.md)."""


def train_together(
    configs: Sequence[TrainConfig | Mapping[str, Any]],
    *,
    backbone: BackboneLike | None = None,
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
        backbone: As for `train`; None: the one that they all name is loaded.
        examples: Per run, already read; None: its `train` is read.
        dev_examples: Per run, already read; None: its `dev` is read, if it is set.
        resume: Go on from the states in the folders; a run without a state starts, where there is no artifact yet.
        on_event: Called with every event, with the run's folder added as `run`; in the first process only.
        processes: As in `train`.
        teach: As in `prepare`, called for each run.

    Raises:
        CheckpointError: As in `train`.
        ConfigError: As in `train`; or the runs cannot share a backbone, or would write to the same folder.
        DataError: As in `train`.
        TrainingError: A run's loss was not finite, after the others were complete.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the states are saved.
    """
    planned = [TrainConfig.from_arguments(config, {}) for config in configs]
    check_together(planned)
    backbone, none = None if backbone is None else as_backbone(backbone), [None] * len(planned)
    for given in (examples, dev_examples):
        if given is not None and len(given) != len(planned):
            message = f"there are {len(planned)} runs, but examples of {len(given)}."
            raise ConfigError(message, hint="give those of each run, or None to read its file.")
    inputs = list(zip(examples or none, dev_examples or none, strict=True))
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(init_distributed(planned[0].device)) if processes is None else processes
        if backbone is None:
            for config, given in zip(planned, inputs, strict=True):
                # What is wrong with one is refused before the model of all is loaded; files are read again later.
                begun = resume and has_state(Path(config.output))
                if not begun:
                    check_unused(Path(config.output))
                check_named(read_data(config, *given)[0], begun=begun)
            backbone = load_for(planned[0], processes)
        options: dict[str, Any] = {"resume": resume, "teach": teach, "processes": processes, "shares_passes": True}
        runs = [
            stack.enter_context(prepare(config, backbone, *given, **options, begin=False))
            for config, given in zip(planned, inputs, strict=True)
        ]
        begin_together(runs)
        stop = stack.enter_context(stop_requests())
        for run, event in take_steps(backbone, runs, stop):
            run.record(event)
            if on_event is not None and processes.is_main:
                on_event({**event, "run": str(run.folder)})
        if stop.is_set() and not all(run.loop.ended for run in runs):
            raise KeyboardInterrupt("the states are saved")
        for run in runs:
            # All of them have ended.
            (run.folder / EARLIER_STATE_FILE).unlink(missing_ok=True)
        return [run.result() for run in runs]


def check_together(configs: Sequence[TrainConfig]) -> None:
    """Refuse runs that cannot share a backbone; all faults at once.

    Raises:
        ConfigError: They cannot.
    """
    faults = [] if configs else ["there is no run"]
    shared = ("backbone", "dtype", "device", "quantize", "attention", "adapter", "gradient_checkpointing", "shard")
    differs = [name for name in shared if len({getattr(config, name) for config in configs}) > 1]
    if differs:
        faults.append(f"{', '.join(differs)} differs, but all runs share one backbone")
    if len({Path(config.output).resolve() for config in configs}) < len(configs):
        faults.append("several runs would write to one output")
    if len(configs) == 1 and configs[0].beside == SELF:
        faults.append("beside is 'self', but there is no other run")
    others = [config for config in configs if not config.trains_prefix]
    faults += [
        f"the run in {one.output!r} has method {one.method!r}, but only prefixes share a backbone" for one in others
    ]
    if faults:
        raise ConfigError(
            "; ".join(faults) + ".", hint="give each run an output of its own, and train separately what differs."
        )


def begin_together(runs: Sequence[Run]) -> None:
    """Give each run what stands beside its prefix, and begin or resume all of them, at one step if they see each other.

    Raises:
        CheckpointError: There is no such step.
    """
    loops = [run.loop for run in runs]
    see_each_other = any(loop.config.beside == SELF for loop in loops)
    for loop in loops:
        loop.keeps_earlier = see_each_other
        if loop.config.beside == SELF:
            loop.stand_beside(_other_runs([other for other in loops if other is not loop], loop.backbone))
    if see_each_other:
        _choose_checkpoints(runs)
    for run in runs:
        run.begin()


def _choose_checkpoints(runs: Sequence[Run]) -> None:
    """Let all runs resume at the last step that all of them can resume at; a kill may come between the saves of a step.

    A run that was over by that step only has to be so.

    Raises:
        CheckpointError: There is no such step.
    """
    steps = {run.loop.config.output: [one.facts.step for one in run.checkpoints] for run in runs}
    for step in sorted({0}.union(*steps.values()), reverse=True):
        found = [
            [one for one in run.checkpoints if one.facts.step == step or one.is_over_by(step, run.loop.state)]
            for run in runs
        ]
        if all(states or not (step or run.checkpoints) for run, states in zip(runs, found, strict=True)):
            for run, states in zip(runs, found, strict=True):
                run.checkpoints = states[:1]
            return
    raise CheckpointError(
        f"the runs stand beside each other, but have no states of one step: {steps}.",
        hint="start them again in other folders.",
    )


def _other_runs(loops: Sequence[TrainLoop], backbone: Backbone) -> Beside:
    """The prefixes of other runs, as they are at each step."""
    facts = [(Path(loop.config.output).name, loop.site_lengths, loop.data.digest, loop.config.seed) for loop in loops]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    lengths = [loop.site_lengths for loop in loops]
    return Beside([loop.current_prefix for loop in loops], lengths, backbone.rotation, digest)


# --- the steps -------------------------------------------------------------------------------------------------------


def take_steps(backbone: Backbone, runs: Sequence[Run], stop: threading.Event) -> Iterator[tuple[Run, Event]]:
    """Take all steps of runs together; yields every event as it happens, and must be used up.

    A run that has taken its steps ends with the event `end`, one that was stopped without.

    Args:
        backbone: Of all runs; for several, it must read packed rows.
        runs: Begun or resumed.
        stop: When it is set, all runs save after this step, and end.

    Raises:
        TrainingError: The loss of a run was not finite; the others have gone on to their end.
    """
    most_positions = positions_at_once(backbone)
    failed: list[TrainingError] = []
    for run in runs:
        run.loop.most_positions = most_positions
        yield run, run.loop.first_event()
    remaining = {run: run.loop.remaining_steps() for run in runs}

    @contextlib.contextmanager
    def failing(run: Run) -> Iterator[None]:
        """An error of a run ends that run alone."""
        try:
            yield
        except TrainingError as error:
            remaining.pop(run, None)
            failed.append(error)

    while remaining:
        # One answer for all runs of a step: those that stand beside each other stop and resume at the same one.
        stops = threading.Event()
        if stop.is_set():
            stops.set()
        pending: dict[Run, PendingStep] = {}
        for run, steps in list(remaining.items()):
            with failing(run):
                if (batches := next(steps, None)) is not None:
                    pending[run] = run.loop.prepare(batches)
                    continue
                del remaining[run]
                for event in run.loop.last_events():
                    yield run, event
        _forward_backward(backbone, pending, most_positions)
        saved = set[Run]()
        for run, step in pending.items():
            with failing(run):
                yield run, run.loop.apply(step, stops)
                for event in run.loop.evaluate_and_save(stops):
                    if event["event"] == "save":
                        saved.add(run)
                    yield run, event
        if saved and any(run.loop.keeps_earlier for run in pending):
            # All can resume at one step.
            for run in pending.keys() & remaining.keys() - saved:
                run.loop.save()
        if stops.is_set():
            stop.set()
    if failed:
        raise failed[0]


def _forward_backward(backbone: Backbone, pending: Mapping[Run, PendingStep], most_positions: int) -> None:
    """The gradients of a step of each run: in their order, as many as have few enough positions share a pass."""
    # They may reach each other's gradients, so that all are scaled alike.
    scale = min((step.scale for step in pending.values()), default=1.0)
    passes: list[list[PendingStep]] = []
    left = 0
    for step in pending.values():
        step.scale = scale
        if step.size > left:
            passes.append([])
            left = most_positions
        passes[-1].append(step)
        left -= step.size
    for steps in passes:
        forward_backward(backbone, steps)


def positions_at_once(backbone: Backbone) -> int:
    """Most positions of a pass over a backbone, so that memory does not grow with `batch_size`."""
    return MOST_POSITIONS_ON_CPU if backbone.device.type == "cpu" else MOST_POSITIONS
