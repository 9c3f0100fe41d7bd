"""A run in its folder: begun or resumed, trained, logged; and what it leaves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from prefixtune.backbone.prefixes import load_prefix
from prefixtune.prefix.prefix import Prefix
from prefixtune.training import run_folder
from prefixtune.training.checkpoint import Checkpoint
from prefixtune.training.loop import TrainLoop
from prefixtune.training.run_folder import Event, read_events
from prefixtune.training.trackers import Tracker, report, tracking
from prefixtune.utils.files import append_line, write_text


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


class Run:
    """A loop with its folder, which is only its own until the block of `with` ends.

    Attributes:
        loop: The training itself.
        checkpoints: The states that `begin` can go on from, which takes the first; none: the run is new, or has begun.
        events: So far.
        until_closed: What is open while the folder is the run's own.
    """

    def __init__(self, loop: TrainLoop, checkpoints: list[Checkpoint], until_closed: contextlib.ExitStack) -> None:
        self.loop, self.checkpoints = loop, checkpoints
        self.events: list[Event] = []
        self.until_closed = until_closed
        self._trackers: dict[str, Tracker] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self.until_closed.__exit__(*error)

    @property
    def folder(self) -> Path:
        """Where it is stored."""
        return Path(self.loop.config.output)

    def begin(self) -> None:
        """Go on from the state, with its log; or write a new run's configuration, log and first state.

        Raises:
            CheckpointError: The state or the log is broken.
            ConfigError: The state belongs to other data or another backbone; or a tracker does not start.
            PrefixError: The folder cannot be written.
        """
        loop, is_main = self.loop, self.loop.processes.is_main
        # They may be as large as the model.
        checkpoint, self.checkpoints = next(iter(self.checkpoints), None), []
        if checkpoint is not None:
            loop.resume(checkpoint)
            self.events = read_events(self.folder / run_folder.EVENTS_FILE, loop.state.step)
            # All processes have read the log before the first one changes it.
            loop.processes.barrier()
        self.folder.mkdir(parents=True, exist_ok=True)
        # Before anything else is written: a tracker that does not start leaves no run behind.
        self._trackers = self.until_closed.enter_context(tracking(loop))
        if is_main:
            write_text(self.folder / run_folder.EVENTS_FILE, "".join(json.dumps(event) + "\n" for event in self.events))
            if checkpoint is None:
                write_text(self.folder / run_folder.CONFIG_FILE, loop.config.to_toml())
                # From now on, even a kill can be resumed from.
                loop.save()
            elif checkpoint.path.name == run_folder.EARLIER_STATE_FILE:
                os.replace(checkpoint.path, self.folder / run_folder.STATE_FILE)

    def train(self, stop: threading.Event, on_event: Callable[[Event], None] = lambda event: None) -> TrainResult:
        """Train to the end.

        Args:
            stop: When it is set, the state is saved after the step.
            on_event: Called with every event, as it happens.

        Raises:
            TrainingError: The loss is not finite; the last good state is kept.
            KeyboardInterrupt: `stop` was set before the last step.
        """
        for event in self.loop.run(stop):
            self.record(event)
            on_event(event)
        if stop.is_set() and not self.loop.ended:
            raise KeyboardInterrupt("the state is saved")
        return self.result()

    def record(self, event: Event) -> None:
        """Keep, log and report an event."""
        self.events.append(event)
        if self.loop.processes.is_main:
            append_line(self.folder / run_folder.EVENTS_FILE, json.dumps(event))
        report(self._trackers, self.loop, event)

    def result(self) -> TrainResult:
        """What the run leaves, once the first process has written it."""
        loop, trains_prefix = self.loop, self.loop.config.trains_prefix
        path = self.folder / (run_folder.PREFIX_FILE if trains_prefix else run_folder.WEIGHTS_FILE)
        loop.processes.barrier()
        return TrainResult(
            load_prefix(path) if trains_prefix else None,
            path,
            loop.state.step,
            loop.state.best_loss,
            sum(parameter.numel() for parameter in loop.trained),
            tuple(self.events),
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
