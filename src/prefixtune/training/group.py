"""Runs that share every pass over one backbone; they join and leave between steps."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping

import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.batch import Batch
from prefixtune.errors import TrainingError
from prefixtune.training.beside import SELF
from prefixtune.training.folder import Event
from prefixtune.training.loop import MOST_POSITIONS, PendingStep, forward_backward
from prefixtune.training.runs import Run

__all__ = ["RunGroup"]


MOST_POSITIONS_OF_A_THREAD, MOST_POSITIONS_ON_CPU = 192, 1024
"""Of runs that share passes on a processor, with one thread and with more: larger passes are a little quicker, and take
more memory, for SmolLM2-135M in bfloat16 1.2 MiB a token (docs/LOG.md)."""


class RunGroup:
    """Runs that train together: each has the gradients that it has alone, up to rounding.

    Args:
        backbone: Of all runs; for several at once, it must read packed rows.
        catches: Errors that end only the run that they come from. Of a pass that fails with one of them, each run's
            part is computed alone.

    Attributes:
        failed: The runs that an error has ended, with it; they have left.
    """

    def __init__(self, backbone: Backbone, catches: tuple[type[Exception], ...] = (TrainingError,)) -> None:
        self._backbone, self._catches = backbone, catches
        self._most_positions = _positions_at_once(backbone)
        self._new: list[Run] = []
        self._remaining: dict[Run, Iterator[list[tuple[Batch, bool]]]] = {}
        self._shares_passes = True
        self.failed: list[tuple[Run, Exception]] = []

    @property
    def runs(self) -> list[Run]:
        """Those that train, in the order in which they joined."""
        return [*self._remaining, *self._new]

    def add(self, run: Run) -> None:
        """Let a run take part from the next step on."""
        run.loop.most_positions = self._most_positions
        self._new.append(run)
        self._shares_passes = True

    def remove(self, run: Run) -> None:
        """Take a run out; what it has not saved is lost, unless it is saved before."""
        self._remaining.pop(run, None)
        self._new = [other for other in self._new if other is not run]
        self._shares_passes = True

    def step(self, stop: threading.Event) -> Iterator[tuple[Run, Event]]:
        """Take one optimizer step of each run; yields every event as it happens, and must be used up.

        A run that has taken all its steps leaves with the event `end`, one that was stopped without.

        Args:
            stop: When it is set, all runs save after this step and leave at the next one.
        """
        yield from self._start_new()
        pending: dict[Run, PendingStep] = {}
        # One answer for all runs of a step: those that stand beside each other stop and resume at the same one.
        stops = threading.Event()
        if stop.is_set():
            stops.set()
        for run, remaining in list(self._remaining.items()):
            with self._failing(run):
                if (batches := next(remaining, None)) is not None:
                    pending[run] = run.loop.prepare(batches)
                    continue
                self.remove(run)
                for event in run.loop.last_events():
                    yield run, event
        self._compute(pending)
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

    def _start_new(self) -> Iterator[tuple[Run, Event]]:
        new, self._new = self._new, []
        self._remaining |= {run: run.loop.remaining_steps() for run in new}
        for run in new:
            with self._failing(run):
                for event in run.loop.first_events():
                    yield run, event

    def _compute(self, pending: dict[Run, PendingStep]) -> None:
        """Losses and gradients of the steps; those that fail alone as well are taken out."""
        for runs in _passes(pending, self._most_positions):
            if len(runs) > 1 and self._compute_at_once([pending[run] for run in runs]):
                continue
            for run in runs:
                with self._failing(run):
                    forward_backward(self._backbone, [pending[run]])
                    continue
                del pending[run]

    def _compute_at_once(self, steps: list[PendingStep]) -> bool:
        """Compute steps of several runs in one pass; False: it failed, and nothing of it is left."""
        if not self._shares_passes:
            return False
        try:
            forward_backward(self._backbone, steps)
        except self._catches:
            # What a pass of all asks for too much, such as memory; not tried again before the runs are others.
            self._shares_passes = False
        else:
            return True
        for step in steps:
            step.reset()
        if self._backbone.device.type == "cuda":
            torch.cuda.empty_cache()
        return False

    @contextlib.contextmanager
    def _failing(self, run: Run) -> Iterator[None]:
        """An error that the group catches ends the run."""
        try:
            yield
        except self._catches as error:
            self.remove(run)
            self.failed.append((run, error))


def _positions_at_once(backbone: Backbone) -> int:
    if backbone.device.type != "cpu":
        return MOST_POSITIONS
    return MOST_POSITIONS_ON_CPU if torch.get_num_threads() > 1 else MOST_POSITIONS_OF_A_THREAD


def _passes(pending: Mapping[Run, PendingStep], most_positions: int) -> list[list[Run]]:
    """Which runs share passes: in their order, as many as together have at most so many positions in one."""
    passes: list[list[Run]] = []
    left = 0
    for run, step in pending.items():
        size = max(batch.input_ids.numel() for batch in step.batches)
        if size > left:
            passes.append([])
            left = most_positions
        passes[-1].append(run)
        left -= size
    return passes
