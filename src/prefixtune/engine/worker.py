"""An engine that runs in a thread of its own; callers submit requests and get their outputs through a callback.

Callbacks run in a second thread, so that a slow one never delays the computing. If the engine itself fails, its
requests end with `error`, a new engine is created, and the worker goes on.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from prefixtune.backbone.backbone import Backbone
from prefixtune.engine.engine import Engine
from prefixtune.engine.request import EngineFull, Request, SequenceOutput
from prefixtune.engine.sequence import RunningSequence

__all__ = ["EngineWorker", "Snapshot"]


_log = logging.getLogger(__name__)
_LONGEST_PAUSE = 5.0
"""Seconds between attempts to restart a failed engine."""

R = TypeVar("R")
OnOutput = Callable[[SequenceOutput], None]


@dataclass(frozen=True)
class Snapshot:
    """What the engine is doing now, and its counters.

    Attributes:
        running: The sequences that have a slot, by slot.
        waiting: How many sequences wait for a slot.
        steps: Steps computed so far.
        tokens: Tokens generated so far.
        batch_sizes: Sequences computed in a step -> number of such steps.
        restarts: How often the engine failed and was restarted.
        failed_callbacks: How often a callback raised an error.
    """

    running: tuple[RunningSequence, ...]
    waiting: int
    steps: int
    tokens: int
    batch_sizes: Mapping[int, int]
    restarts: int
    failed_callbacks: int


@dataclass(eq=False)
class _Submission:
    """A request that has not ended: its callback, and which of its sequences go on."""

    number: int
    on_output: OnOutput
    unfinished: set[int]
    callback_failed: bool = False


class EngineWorker:
    """Runs an engine until it is closed. May be used from any thread.

    Args:
        engine: The worker's alone from now on.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._submissions: dict[str, _Submission] = {}
        # When, which submission, and its id: of those that ended too, so that nothing else of them is kept here.
        self._deadlines: list[tuple[float, int, str]] = []
        self._numbers = itertools.count()
        self._accepting, self._closing, self._restarting = True, False, False
        self._steps = self._tokens = self._restarts = self._failed_callbacks = 0
        self._batch_sizes: Counter[int] = Counter()
        # Guards all of the above. Acquired before the engine's own lock, never after it.
        self._changed = threading.Condition()
        self._outputs: queue.SimpleQueue[tuple[_Submission, SequenceOutput] | threading.Event | None] = (
            queue.SimpleQueue()
        )
        self._threads = [
            threading.Thread(target=self._compute, name="prefixtune-engine", daemon=True),
            threading.Thread(target=self._deliver, name="prefixtune-outputs", daemon=True),
        ]
        self._calls: deque[tuple[Future[Any], Callable[[Backbone], Any]]] = deque()
        for thread in self._threads:
            thread.start()

    # --- for callers --------------------------------------------------------------------------------------------------

    def submit(self, request: Request, on_output: OnOutput, deadline: float | None = None) -> None:
        """Submit a request.

        Args:
            request: The request.
            on_output: Called with all its outputs, in order, from a thread of the worker. A slow one delays the outputs
                of other requests; if it raises, the request is cancelled.
            deadline: Seconds from now until the request must be done; then its sequences end with `timeout`.

        Raises:
            EngineFull: Too many texts wait, the worker is closing, or the engine is restarting: try again later.
            RequestError: The engine refuses it.
            BackboneError: Its prefix does not fit the backbone.
        """
        with self._changed:
            if not self._accepting:
                raise EngineFull(
                    "the engine is being closed and accepts no more requests.", hint="use another replica."
                )
            if self._restarting:
                raise EngineFull("the engine is restarting.", hint="try again later.")
            # Refuses an id in use, so that no entry is overwritten below.
            self.engine.add(request)
            number = next(self._numbers)
            self._submissions[request.id] = _Submission(number, on_output, set(range(request.n)))
            if deadline is not None:
                heapq.heappush(self._deadlines, (time.monotonic() + deadline, number, request.id))
            self._changed.notify_all()

    def call(self, work: Callable[[Backbone], R]) -> Future[R]:
        """Let the model do something else between two steps; the running texts wait meanwhile, so it should be short.

        Args:
            work: Called with the engine's backbone, in the engine's thread. Of several, one is called before each step.

        Raises:
            EngineFull: The worker is closing.
        """
        future: Future[R] = Future()
        with self._changed:
            if not self._accepting:
                raise EngineFull("the engine is being closed and accepts no more work.", hint="use another replica.")
            self._calls.append((future, work))
            self._changed.notify_all()
        return future

    def cancel(self, request_id: str) -> None:
        """Cancel a request; its sequences end with `cancelled`. Unknown ids are ignored."""
        with self._changed:
            self.engine.cancel(request_id)
            self._changed.notify_all()

    def drain(self, timeout: float | None = None) -> bool:
        """Accept no more requests, and wait until all are done and all outputs are delivered.

        Returns:
            Whether that took no more than `timeout` seconds.
        """
        end = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._accepting = False
            if not self._changed.wait_for(lambda: not self._submissions, timeout):
                return False
        delivered = threading.Event()
        self._outputs.put(delivered)
        while not delivered.wait(0.02):
            if end is not None and time.monotonic() > end:
                return False
            if not self._threads[1].is_alive():
                break
        return True

    def close(self, timeout: float = 10.0) -> None:
        """Cancel what still runs, and stop; waits at most `timeout` seconds for a step or for slow callbacks."""
        with self._changed:
            self._accepting, self._closing = False, True
            while self._calls:
                future, _ = self._calls.popleft()
                if future.set_running_or_notify_cancel():
                    future.set_exception(EngineFull("the engine is being closed.", hint="use another replica."))
            for request_id in self._submissions:
                self.engine.cancel(request_id)
            self._changed.notify_all()
        end = time.monotonic() + timeout
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, end - time.monotonic()))

    def __enter__(self) -> EngineWorker:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    @property
    def healthy(self) -> bool:
        """Whether requests are computed: both threads are alive, and the engine is not restarting."""
        return not self._restarting and all(thread.is_alive() for thread in self._threads)

    @property
    def num_unfinished(self) -> int:
        """Requests that have not ended."""
        return len(self._submissions)

    def snapshot(self) -> Snapshot:
        """What the engine is doing now, and its counters."""
        with self._changed:
            return Snapshot(
                running=self.engine.running_sequences(),
                waiting=self.engine.num_waiting,
                steps=self._steps,
                tokens=self._tokens,
                batch_sizes=dict(sorted(self._batch_sizes.items())),
                restarts=self._restarts,
                failed_callbacks=self._failed_callbacks,
            )

    # --- the two threads ----------------------------------------------------------------------------------------------

    def _compute(self) -> None:
        while self._wait_for_work():
            self._do_call()
            if not self.engine.busy:
                continue
            try:
                outputs = self.engine.step()
            except BaseException as error:
                _log.exception("the engine failed; it is restarted.")
                failure = type(error).__name__
            else:
                self._record_step(outputs)
                continue
            # After the handler: the error holds what the step computed with.
            self._restart(failure)
        self._outputs.put(None)

    def _do_call(self) -> None:
        """Do the first of the waiting calls, if there is one."""
        with self._changed:
            if not self._calls:
                return
            future, work = self._calls.popleft()
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = work(self.engine.backbone)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    def _wait_for_work(self) -> bool:
        """Wait until there is something to compute; False: the worker ends."""
        with self._changed:
            while True:
                if self._closing and (self._restarting or not self.engine.busy):
                    return False
                self._cancel_expired()
                if self.engine.busy or self._calls:
                    return True
                self._changed.wait()

    def _cancel_expired(self) -> None:
        """Cancel the requests whose deadline has passed; the lock is held."""
        now = time.monotonic()
        while self._deadlines and self._deadlines[0][0] <= now:
            entry = heapq.heappop(self._deadlines)
            if self._is_unfinished(entry):
                self.engine.cancel(entry[2], "timeout")
        # Entries of requests that ended in time are dropped before they pile up.
        if len(self._deadlines) > 2 * len(self._submissions) + 100:
            self._deadlines = list(filter(self._is_unfinished, self._deadlines))
            heapq.heapify(self._deadlines)

    def _is_unfinished(self, entry: tuple[float, int, str]) -> bool:
        """Whether the submission of a deadline has not ended; its id may be in use again. The lock is held."""
        _, number, request_id = entry
        submission = self._submissions.get(request_id)
        return submission is not None and submission.number == number

    def _record_step(self, outputs: list[SequenceOutput]) -> None:
        with self._changed:
            if self.engine.batch_size:
                self._steps += 1
                self._batch_sizes[self.engine.batch_size] += 1
            for output in outputs:
                self._tokens += len(output.tokens)
                self._enqueue(output)
            self._changed.notify_all()

    def _enqueue(self, output: SequenceOutput) -> None:
        """Queue an output for delivery; the lock is held."""
        submission = self._submissions.get(output.request_id)
        if submission is None:
            return
        if output.finish_reason is not None:
            submission.unfinished.discard(output.index)
            if not submission.unfinished:
                del self._submissions[output.request_id]
        self._outputs.put((submission, output))

    def _restart(self, failure: str) -> None:
        """End all requests and create a new engine."""
        message = f"the engine failed and was restarted ({failure}): send the request again."
        with self._changed:
            self._restarting = True
            self._restarts += 1
            for request_id, submission in list(self._submissions.items()):
                for index in sorted(submission.unfinished):
                    self._enqueue(SequenceOutput(request_id, index, (), "", "error", message, engine_crashed=True))
            self._changed.notify_all()
        # There may be no room for the slots of both.
        self.engine.free()
        pause = 0.05
        while not self._closing:
            try:
                engine = Engine(self.engine.backbone, self.engine.config)
            except Exception:
                _log.exception("the engine cannot be restarted yet.")
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                continue
            with self._changed:
                self.engine, self._restarting = engine, False
            return

    def _deliver(self) -> None:
        while (item := self._outputs.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            submission, output = item
            if submission.callback_failed:
                continue
            try:
                submission.on_output(output)
            except BaseException:
                _log.exception("the callback of request %s failed; the request is cancelled.", output.request_id)
                submission.callback_failed = True
                with self._changed:
                    self._failed_callbacks += 1
                    # If it has ended, its id may be another's.
                    if self._submissions.get(output.request_id) is submission:
                        self.cancel(output.request_id)
