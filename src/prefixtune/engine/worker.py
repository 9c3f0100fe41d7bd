"""The torch engine in a thread of its own; callers submit requests and get their outputs through a callback.

Callbacks run in a second thread, so that a slow one never delays the computing. If the engine itself fails, all
requests end with `error`, and the worker accepts no more: whoever runs it ends the process, which a supervisor starts
again.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.engine.base import Receive, Snapshot
from prefixtune.engine.engine import Engine
from prefixtune.engine.request import EngineFull, Request, SequenceOutput
from prefixtune.errors import PrefixError

__all__ = ["EngineWorker"]


_log = logging.getLogger(__name__)

R = TypeVar("R")


@dataclass(eq=False)
class _Submission:
    """A request that has not ended: its callback, which of its sequences go on, and when it must be done."""

    receive: Receive
    unfinished: set[int]
    deadline: float
    callback_failed: bool = False


class EngineWorker:
    """Runs an engine until it is closed or fails (see `base.Engine`). May be used from any thread.

    Args:
        engine: The worker's alone from now on.

    Attributes:
        lacks: Nothing.
        failed: Whether the engine has failed.
        on_failure: Called, in a thread of the worker, after the engine has failed and all requests know it.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.lacks: Mapping[str, Any] = {}
        self.on_failure: Callable[[], None] = lambda: None
        self._submissions: dict[str, _Submission] = {}
        self._accepting, self._closing, self.failed = True, False, False
        self._steps = self._texts = self._tokens = 0
        # Guards all of the above. Acquired before the engine's own lock, never after it.
        self._changed = threading.Condition()
        self._outputs: queue.SimpleQueue[tuple[_Submission, SequenceOutput] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._compute, name="prefixtune-engine", daemon=True),
            threading.Thread(target=self._deliver, name="prefixtune-outputs", daemon=True),
        ]
        self._calls: deque[tuple[Future[Any], Callable[[Backbone], Any]]] = deque()
        for thread in self._threads:
            thread.start()

    # --- for callers --------------------------------------------------------------------------------------------------

    def submit(self, request: Request, receive: Receive, deadline: float | None = None) -> None:
        """Submit a request (see `base.Engine`)."""
        with self._changed:
            self._check_accepting()
            # Refuses an id in use, so that no entry is overwritten below.
            self.engine.add(request)
            end = math.inf if deadline is None else time.monotonic() + deadline
            self._submissions[request.id] = _Submission(receive, set(range(request.n)), end)
            self._changed.notify_all()

    def call(self, work: Callable[[Backbone], R]) -> Future[R]:
        """Let the model do something else between two steps; the running texts wait meanwhile, so it should be short.

        Args:
            work: Called with the engine's backbone, in the engine's thread. Of several, one is called before each step.

        Raises:
            EngineFull: The worker is closing or has failed.
        """
        future: Future[R] = Future()
        with self._changed:
            self._check_accepting()
            self._calls.append((future, work))
            self._changed.notify_all()
        return future

    def _check_accepting(self) -> None:
        """Refuse work that would never be done; the lock is held."""
        if self.failed:
            raise EngineFull("the engine has failed and accepts no more requests.", hint="start it again.")
        if not self._accepting:
            raise EngineFull("the engine is being closed and accepts no more requests.", hint="use another replica.")

    def cancel(self, request_id: str) -> None:
        """Cancel a request; its sequences end with `cancelled`. Unknown ids are ignored."""
        with self._changed:
            self.engine.cancel(request_id)
            self._changed.notify_all()

    def close(self, timeout: float = 10.0) -> None:
        """Cancel what still runs, and stop; waits at most `timeout` seconds for a step or for slow callbacks."""
        with self._changed:
            self._accepting, self._closing = False, True
            self._refuse_calls("the engine is being closed.")
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

    def _refuse_calls(self, why: str) -> None:
        """End the waiting calls; the lock is held."""
        while self._calls:
            future, _ = self._calls.popleft()
            if future.set_running_or_notify_cancel():
                future.set_exception(EngineFull(why, hint="use another replica."))

    @property
    def backbone(self) -> Backbone:
        """The engine's model."""
        return self.engine.backbone

    @property
    def max_length(self) -> int:
        """Most positions of a text."""
        return self.engine.max_length

    @property
    def vocab_size(self) -> int:
        """Tokens that the model can read."""
        return self.engine.vocab_size

    def available_tokens(self, prompt_tokens: int, prefix_length: int) -> int:
        """As `Engine.available_tokens`."""
        return self.engine.available_tokens(prompt_tokens, prefix_length)

    def check_length(self, prompt_tokens: int, prefix_length: int, new_tokens: int) -> None:
        """As `Engine.check_length`."""
        self.engine.check_length(prompt_tokens, prefix_length, new_tokens)

    @property
    def healthy(self) -> bool:
        """Whether requests are computed: the engine has not failed, and both threads are alive."""
        return not self.failed and all(thread.is_alive() for thread in self._threads)

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
                texts=self._texts,
            )

    # --- the two threads ----------------------------------------------------------------------------------------------

    def _compute(self) -> None:
        try:
            while self._wait_for_work():
                self._do_call()
                if self.engine.busy:
                    self._record_step(self.engine.step())
        except BaseException as error:
            _log.exception("the engine failed")
            self._fail(type(error).__name__)
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
            # As in a step of the engine: a GPU that failed computes nothing more.
            on_gpu = self.backbone.device.type != "cpu"
            if on_gpu and not isinstance(error, PrefixError | torch.OutOfMemoryError):
                raise
        else:
            future.set_result(result)

    def _wait_for_work(self) -> bool:
        """Wait until there is something to compute; False: the worker ends."""
        with self._changed:
            while True:
                if self._closing and not self.engine.busy:
                    return False
                self._cancel_expired()
                if self.engine.busy or self._calls:
                    return True
                self._changed.wait()

    def _cancel_expired(self) -> None:
        """Cancel the requests whose deadline has passed; the lock is held."""
        now = time.monotonic()
        for request_id, submission in self._submissions.items():
            if submission.deadline <= now:
                self.engine.cancel(request_id, "timeout")

    def _record_step(self, outputs: list[SequenceOutput]) -> None:
        with self._changed:
            if self.engine.batch_size:
                self._steps += 1
                self._texts += self.engine.batch_size
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

    def _fail(self, failure: str) -> None:
        """End all requests, and accept no more."""
        with self._changed:
            self.failed, self._accepting = True, False
            for request_id, submission in list(self._submissions.items()):
                for index in sorted(submission.unfinished):
                    error = f"the engine failed ({failure})."
                    self._enqueue(SequenceOutput(request_id, index, (), "", "error", error, engine_crashed=True))
            self._refuse_calls("the engine failed.")
            self._changed.notify_all()

    def _deliver(self) -> None:
        while (item := self._outputs.get()) is not None:
            submission, output = item
            if submission.callback_failed:
                continue
            try:
                submission.receive(output)
            except BaseException:
                _log.exception("the callback of request %s failed; the request is cancelled.", output.request_id)
                submission.callback_failed = True
                with self._changed:
                    # If it has ended, its id may be another's.
                    if self._submissions.get(output.request_id) is submission:
                        self.cancel(output.request_id)
        if self.failed:
            self.on_failure()
