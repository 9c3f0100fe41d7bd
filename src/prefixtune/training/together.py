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
from prefixtune.backbone.batch import Batch
from prefixtune.data import Example
from prefixtune.errors import CheckpointError, ConfigError, TrainingError
from prefixtune.training.beside import SELF, Beside
from prefixtune.training.checkpoint import Checkpoint, read_checkpoint
from prefixtune.training.config import TrainConfig
from prefixtune.training.distributed import ProcessGroup, init_distributed
from prefixtune.training.loop import MOST_POSITIONS, PendingStep, TrainLoop, forward_backward
from prefixtune.training.prepare import Teach, load_for, prepare
from prefixtune.training.run import Run, TrainResult, stop_requests
from prefixtune.training.run_folder import EARLIER_STATE_FILE, Event

MOST_POSITIONS_ON_CPU = 1024
"""Of runs that share passes on a processor: larger passes are a little quicker, and take more memory, for SmolLM2-135M
in bfloat16 1.2 MiB a token (research/LOG.md)."""


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
    none = [None] * len(planned)
    inputs = list(zip(examples or none, dev_examples or none, strict=True))
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(init_distributed(planned[0].device)) if processes is None else processes
        loaded = load_for(planned[0], processes) if backbone is None else backbone
        options: dict[str, Any] = {"resume": resume, "teach": teach, "processes": processes, "shares_passes": True}
        runs = [
            stack.enter_context(prepare(config, loaded, *given, **options, begin=False))
            for config, given in zip(planned, inputs, strict=True)
        ]
        begin_together(runs, resume=resume)
        stop = stack.enter_context(stop_requests())
        group = RunGroup(loaded)
        for run in runs:
            group.add(run)
        while group.runs:
            for run, event in group.step(stop):
                run.record(event)
                if on_event is not None and processes.is_main:
                    on_event({**event, "run": str(run.folder)})
        if stop.is_set() and not all(run.loop.ended for run in runs):
            raise KeyboardInterrupt("the states are saved")
        if group.failed:
            raise group.failed[0][1]
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


def begin_together(runs: Sequence[Run], *, resume: bool) -> None:
    """Give each run what stands beside its prefix, and begin or resume all of them, at one step if they see each other.

    Raises:
        CheckpointError: There is no such step.
    """
    loops = [run.loop for run in runs]
    sees = any(loop.config.beside == SELF for loop in loops)
    for loop in loops:
        if loop.config.beside == SELF:
            loop.stand_beside(_other_runs([other for other in loops if other is not loop], loop.backbone))
    if sees and resume:
        states = [[run.checkpoint, read_checkpoint(run.loop.config, EARLIER_STATE_FILE)] for run in runs]
        for run, checkpoint in zip(runs, common_checkpoints(loops, states), strict=True):
            run.checkpoint = checkpoint
    for run in runs:
        run.begin()


def common_checkpoints(
    loops: Sequence[TrainLoop], states: Sequence[Sequence[Checkpoint | None]]
) -> list[Checkpoint | None]:
    """The states of the last step that all runs can resume at; None: a run starts.

    A kill may come between the saves of a step. A run that was over by that step only has to be so.

    Args:
        loops: The runs.
        states: Of each one, its last state and the one before it, as far as there are such.

    Raises:
        CheckpointError: There is no such step.
    """
    kept = [[some for some in pair if some is not None] for pair in states]
    for step in sorted({some.facts.step for each in kept for some in each} | {0}, reverse=True):
        chosen: list[Checkpoint | None] = []
        for loop, each in zip(loops, kept, strict=True):
            there = [some for some in each if some.facts.step == step]
            over = [some for some in each if some.facts.step < step and some.state(loop.state).is_over]
            if not there and not over and (step or each):
                break
            chosen.append((*there, *over, None)[0])
        else:
            return chosen
    steps = {loop.config.output: [some.facts.step for some in each] for loop, each in zip(loops, kept, strict=True)}
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


# --- the group -------------------------------------------------------------------------------------------------------


class RunGroup:
    """Runs that train together: each has the gradients that it has alone, up to rounding.

    Args:
        backbone: Of all runs; for several at once, it must read packed rows.

    Attributes:
        failed: The runs that a `TrainingError` has ended, with it; they have left, and the others go on.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._most_positions = positions_at_once(backbone)
        self._new: list[Run] = []
        self._remaining: dict[Run, Iterator[list[tuple[Batch, bool]]]] = {}
        self.failed: list[tuple[Run, TrainingError]] = []

    @property
    def runs(self) -> list[Run]:
        """Those that train, in the order in which they joined."""
        return [*self._remaining, *self._new]

    def add(self, run: Run) -> None:
        """Let a run take part from the next step on."""
        run.loop.most_positions = self._most_positions
        self._new.append(run)

    def remove(self, run: Run) -> None:
        """Take a run out; what it has not saved is lost, unless it is saved before."""
        self._remaining.pop(run, None)
        self._new = [other for other in self._new if other is not run]

    def step(self, stop: threading.Event) -> Iterator[tuple[Run, Event]]:
        """Take one optimizer step of each run; yields every event as it happens, and must be used up.

        A run that has taken all its steps leaves with the event `end`, one that was stopped without.

        Args:
            stop: When it is set, all runs save after this step and leave at the next one.
        """
        new, self._new = self._new, []
        for run in new:
            self._remaining[run] = run.loop.remaining_steps()
            yield run, run.loop.first_event()
        # One answer for all runs of a step: those that stand beside each other stop and resume at the same one.
        stops = threading.Event()
        if stop.is_set():
            stops.set()
        pending: dict[Run, PendingStep] = {}
        for run, remaining in list(self._remaining.items()):
            with self._failing(run):
                if (batches := next(remaining, None)) is not None:
                    pending[run] = run.loop.prepare(batches)
                    continue
                self.remove(run)
                for event in run.loop.last_events():
                    yield run, event
        # They may reach each other's gradients, so that all are scaled alike.
        scale = min((step.scale for step in pending.values()), default=1.0)
        for step in pending.values():
            step.scale = scale
        for passed in _passes(pending, self._most_positions):
            forward_backward(self._backbone, [pending[run] for run in passed])
        saved = set[Run]()
        for run, step in pending.items():
            with self._failing(run):
                yield run, run.loop.apply(step, stops)
                for event in run.loop.evaluate_and_save(stops):
                    if event["event"] == "save":
                        saved.add(run)
                    yield run, event
        if saved and any(run.loop.config.beside == SELF for run in pending):
            # All can resume at one step.
            for run in pending.keys() & self._remaining.keys() - saved:
                run.loop.save()
        if stops.is_set():
            stop.set()

    @contextlib.contextmanager
    def _failing(self, run: Run) -> Iterator[None]:
        """An error of a run ends that run alone."""
        try:
            yield
        except TrainingError as error:
            self.remove(run)
            self.failed.append((run, error))


def positions_at_once(backbone: Backbone) -> int:
    """Most positions of a pass over a backbone, so that memory does not grow with `batch_size`."""
    return MOST_POSITIONS_ON_CPU if backbone.device.type == "cpu" else MOST_POSITIONS


def _passes(pending: Mapping[Run, PendingStep], most_positions: int) -> list[list[Run]]:
    """Which runs share passes: in their order, as many as together have at most so many positions in one."""
    passes: list[list[Run]] = []
    left = 0
    for run, step in pending.items():
        if step.size > left:
            passes.append([])
            left = most_positions
        passes[-1].append(run)
        left -= step.size
    return passes
