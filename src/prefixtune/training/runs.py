"""Runs that are open: their logs, how they stop, and the one step that all resume at."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefixtune.backbone.prefixes import load_prefix
from prefixtune.errors import CheckpointError
from prefixtune.prefix.prefix import Prefix
from prefixtune.training.beside import SELF
from prefixtune.training.checkpoint import Checkpoint, TrainState, is_over
from prefixtune.training.folder import PREFIX_FILE, WEIGHTS_FILE, Event
from prefixtune.training.loop import TrainLoop
from prefixtune.training.trackers import Tracker, report

__all__ = ["Run", "TrainResult", "check_steps", "stop_requests"]


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves.

    Attributes:
        prefix: The best prefix (by the development loss, where there are such examples), baked; None: the method trains
            weights.
        path: The artifact, of the prefix or the weights.
        steps: Optimizer steps taken.
        best_loss: Lowest development loss, in nats per token; NaN without development examples.
        num_trained: Parameters that the optimizer moved.
        events: Everything that was logged.
    """

    prefix: Prefix | None
    path: Path
    steps: int
    best_loss: float
    num_trained: int
    events: tuple[Event, ...] = field(repr=False)


@dataclass(frozen=True, eq=False)
class Run:
    """A loop and its log.

    Attributes:
        loop: Ready to train.
        events: So far.
        log: Appends a line to the log.
        trackers: What it reports to, by name.
    """

    loop: TrainLoop
    events: list[Event]
    log: Callable[[str], None]
    trackers: dict[str, Tracker]

    def record(self, event: Event) -> None:
        """Keep, log and report an event."""
        self.events.append(event)
        if self.loop.processes.is_main:
            self.log(json.dumps(event))
        report(self.trackers, self.loop, event)

    def result(self) -> TrainResult:
        """What the run leaves, once the first process has written it."""
        loop, trains_prefix = self.loop, self.loop.config.trains_prefix
        path = Path(loop.config.output) / (PREFIX_FILE if trains_prefix else WEIGHTS_FILE)
        loop.processes.barrier()
        return TrainResult(
            load_prefix(path) if trains_prefix else None,
            path,
            loop.state.step,
            loop.state.best_loss,
            sum(parameter.numel() for parameter in loop.trained),
            tuple(self.events),
        )


def check_steps(loops: Sequence[TrainLoop], checkpoints: Sequence[Checkpoint | None]) -> None:
    """Refuse to resume runs that see each other's prefixes and are at different steps, but for those that are over.

    Raises:
        CheckpointError: They are: a kill came between their saves.
    """
    if not any(loop.config.beside == SELF for loop in loops):
        return
    steps: dict[str, int] = {}
    for loop, some in zip(loops, checkpoints, strict=True):
        if some is None or not is_over(loop.config, TrainState.from_facts(some.facts, loop.state.total_steps)):
            steps[loop.config.output] = 0 if some is None else some.facts["step"]
    if len(set(steps.values())) > 1:
        raise CheckpointError(
            "the runs stand beside each other, but their states are of different steps: "
            + ", ".join(f"{folder} {step}" for folder, step in steps.items())
            + ".",
            hint="start them again in other folders.",
        )


@contextlib.contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """While the block runs, the first Ctrl-C or SIGTERM sets the event; a second one stops at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def on_signal(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
