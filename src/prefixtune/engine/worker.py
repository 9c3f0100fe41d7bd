"""The torch engine in a thread of its own; callers submit requests and get their outputs through a callback.

If the engine itself fails, all requests end with `error`, and the worker accepts no more: whoever runs it ends the
process, which a supervisor starts again.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.engine import base
from prefixtune.engine.base import Receive, Snapshot
from prefixtune.engine.engine import Engine
from prefixtune.engine.request import EngineFull, Request, SequenceOutput
from prefixtune.errors import PrefixError

_log = logging.getLogger(__name__)

R = TypeVar("R")


@dataclass(eq=False)
class _Submission:
    """A request that has not ended: its callback, which of its sequences go on, and when it must be done."""

    receive: Receive
    unfinished: set[int]
    deadline: float


class EngineWorker(base.Engine):
    """Runs an engine until it is closed or fails (see `base.Engine`). May be used from any thread.

    Args:
        engine: The worker's alone from now on.

    Attributes:
        name: `torch`.
        backbone: The engine's model.
        max_length: Most positions of a text.
        lacks: What the model does not have.
    """

    def __init__(self, engine: Engine) -> None:
        self.name, self.engine = "torch", engine
        self.backbone, self.max_length, self.remedy = engine.backbone, engine.max_length, engine.remedy
        self.lacks = engine.lacks
        self._closing = False
        self._submissions: dict[str, _Submission] = {}
        self._calls: deque[tuple[Future[Any], Callable[[Backbone], Any]]] = deque()
        self._steps = self._texts = self._tokens = 0
        # Guards all of the above. Acquired before the engine's own lock, never after it.
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="prefixtune-engine", daemon=True)
        self._thread.start()

    # --- for callers --------------------------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Refuse what the engine cannot run (see `base.Engine`)."""
        self.engine.check(request)

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
        if self.failed or self._closing:
            why = "has failed" if self.failed else "is being closed"
            raise EngineFull(f"the engine {why} and accepts no more requests.", hint="start it again.")

    def cancel(self, request_id: str) -> None:
        """Cancel a request; its sequences end with `cancelled`. Unknown ids are ignored."""
        with self._changed:
            self.engine.cancel(request_id)
            self._changed.notify_all()

    def close(self) -> None:
        """Cancel what still runs, and stop (see `base.Engine`)."""
        with self._changed:
            self._closing = True
            self._refuse_calls("the engine is being closed.")
            for request_id in self._submissions:
                self.engine.cancel(request_id)
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(base.CLOSE_SECONDS)

    @property
    def healthy(self) -> bool:
        """Whether requests are computed: the engine has not failed, and its thread is alive."""
        return not self.failed and self._thread.is_alive()

    @property
    def num_unfinished(self) -> int:
        """Requests that have not ended."""
        return len(self._submissions)

    def snapshot(self) -> Snapshot:
        """What the engine is doing now, and its counters."""
        with self._changed:
            running, waiting = self.engine.running_sequences(), self.engine.num_waiting
            return Snapshot(running, waiting, steps=self._steps, texts=self._texts, tokens=self._tokens)

    # --- the engine's thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        if self.backbone.device.type == "cuda":
            # The current device is a thread's own.
            torch.cuda.set_device(self.backbone.device)
        try:
            while self._wait_for_work():
                self._do_call()
                if self.engine.busy:
                    outputs = self.engine.step()
                    with self._changed:
                        self._steps += bool(self.engine.batch_size)
                        self._texts += self.engine.batch_size
                    self._deliver(outputs)
        except BaseException as error:
            _log.exception("the engine failed")
            self._fail(f"the engine failed ({type(error).__name__}).")

    def _refuse_calls(self, why: str) -> None:
        """End the waiting calls; the lock is held."""
        for future, _ in self._calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(EngineFull(why, hint="use another replica."))
        self._calls.clear()

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
            if self.backbone.device.type != "cpu" and not isinstance(error, PrefixError | torch.OutOfMemoryError):
                raise
        else:
            future.set_result(result)

    def _wait_for_work(self) -> bool:
        """Wait until there is something to compute; False: the worker ends."""
        with self._changed:
            while not (self.engine.busy or self._calls):
                if self._closing:
                    return False
                self._changed.wait()
            now = time.monotonic()
            for request_id, submission in self._submissions.items():
                if submission.deadline <= now:
                    self.engine.cancel(request_id, "timeout")
            return True

    def _deliver(self, outputs: Sequence[SequenceOutput]) -> None:
        """Count outputs, and call the callbacks; one that raises gets no more, and its request is cancelled."""
        with self._changed:
            found = [(self._submissions[output.request_id], output) for output in outputs]
            for submission, output in found:
                self._tokens += len(output.tokens)
                if output.finish_reason is not None:
                    submission.unfinished.discard(output.index)
                    if not submission.unfinished:
                        del self._submissions[output.request_id]
        for submission, output in found:
            self._give(submission, output)

    def _fail(self, why: str) -> None:
        """End all requests, and accept no more."""
        with self._changed:
            self.failed = True
            self._refuse_calls(why)
            open_texts = [(name, index) for name, one in self._submissions.items() for index in sorted(one.unfinished)]
        self._deliver(
            [SequenceOutput(name, index, (), "", "error", why, engine_crashed=True) for name, index in open_texts]
        )
        self.on_failure()
