"""Runs that are open: their logs, how they stop, and the one step that all resume at."""

from __future__ import annotations

import contextlib
import json
import os
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
from prefixtune.training.checkpoint import Checkpoint, TrainState, is_over, read_checkpoint
from prefixtune.training.folder import PREFIX_FILE, PREVIOUS_FILE, STATE_FILE, WEIGHTS_FILE, Event
from prefixtune.training.loop import TrainLoop
from prefixtune.training.trackers import Tracker, report

__all__ = ["Run", "TrainResult", "agree_on_step", "stop_requests"]


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


def agree_on_step(loops: Sequence[TrainLoop], checkpoints: list[Checkpoint | None]) -> None:
    """Let runs that stand beside each other go on from one step.

    A kill between their saves leaves some of them one save ahead: these go back to the state before. A run that is over
    stays where it ended.

    Args:
        loops: Ready to be resumed.
        checkpoints: Of each, None for one without a state; those of runs that go back are replaced.

    Raises:
        CheckpointError: There is no step that all have a state of.
    """
    if not any(loop.config.beside == SELF for loop in loops):
        return
    steps = [0 if some is None else some.facts["step"] for some in checkpoints]
    last = min(
        (step for step, pair in zip(steps, zip(loops, checkpoints, strict=True), strict=True) if not _is_over(*pair)),
        default=max(steps),
    )
    ahead = [index for index, step in enumerate(steps) if step > last]
    for index in ahead:
        config = loops[index].config
        has_one = (Path(config.output) / PREVIOUS_FILE).exists()
        checkpoints[index] = before = read_checkpoint(config, PREVIOUS_FILE) if has_one else None
        if before is None or before.facts["step"] != last:
            raise CheckpointError(
                "the runs stand beside each other, but their states are of different steps: "
                + ", ".join(f"{loop.config.output} {step}" for loop, step in zip(loops, steps, strict=True))
                + ".",
                hint="start them again in other folders.",
            )
    for index in ahead:
        # All processes have read it before the first one moves it.
        loops[index].processes.barrier()
        if loops[index].processes.is_main:
            folder = Path(loops[index].config.output)
            os.replace(folder / PREVIOUS_FILE, folder / STATE_FILE)


def _is_over(loop: TrainLoop, checkpoint: Checkpoint | None) -> bool:
    """Whether a run to resume has nothing left to do."""
    if checkpoint is None:
        return False
    return is_over(loop.config, TrainState.from_facts(checkpoint.facts, loop.state.total_steps))


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
