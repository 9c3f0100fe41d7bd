"""An engine that runs in a thread of its own, for callers who only hand in requests and are told what comes of them.

News is delivered in a second thread, so that whoever takes it slowly never holds up the computing. If the engine itself
breaks, its requests end with `error`, it is made anew, and serving goes on.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from prefixtune.engine.engine import Engine, RunningSequence
from prefixtune.engine.request import EngineFull, Request, SequenceOutput

__all__ = ["EngineWorker", "Snapshot"]


_log = logging.getLogger(__name__)
_LONGEST_PAUSE = 5.0
"""Seconds between attempts to make a broken engine anew."""

OnOutput = Callable[[SequenceOutput], None]


@dataclass(frozen=True)
class Snapshot:
    """What the engine is at.

    Attributes:
        running: The texts that have a slot, by slot.
        waiting: How many wait for one.
        steps: Steps computed so far.
        tokens: Tokens written so far.
        batch_sizes: Texts computed in a step -> in how many steps so many were.
        restarts: How often the engine had to be made anew.
        failed_callbacks: How often taking news failed.
    """

    running: tuple[RunningSequence, ...]
    waiting: int
    steps: int
    tokens: int
    batch_sizes: Mapping[int, int]
    restarts: int
    failed_callbacks: int


@dataclass(eq=False)
class _Live:
    """A request whose end was not told yet: who is told, and which of its texts go on."""

    on_output: OnOutput
    open: set[int]
    heard: bool = True


class EngineWorker:
    """Runs an engine until it is closed. May be used from any thread.

    Args:
        engine: Not to be used by anyone else from now on.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._live: dict[str, _Live] = {}
        self._deadlines: list[tuple[float, int, str, _Live]] = []
        self._numbers = itertools.count()
        self._accepting, self._closing, self._broken = True, False, False
        self._steps = self._tokens = self._restarts = self._failed_callbacks = 0
        self._batch_sizes: Counter[int] = Counter()
        # Over all of the above. Taken before the engine's own lock, never the other way round.
        self._changed = threading.Condition()
        self._news: queue.SimpleQueue[tuple[_Live, SequenceOutput] | threading.Event | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._compute, name="prefixtune-engine", daemon=True),
            threading.Thread(target=self._deliver, name="prefixtune-news", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    # --- what others ask ----------------------------------------------------------------------------------------------

    def submit(self, request: Request, on_output: OnOutput, deadline: float | None = None) -> None:
        """Hand in a request.

        Args:
            request: What is asked for.
            on_output: Told all news of it, in order, from a thread of the worker's. Slow ones hold up the news of
                others; if it raises, the request is given up.
            deadline: Seconds from now in which the request must be done; else its texts end with `timeout`.

        Raises:
            EngineFull: Too many wait, the worker is being closed, or the engine is being made anew: try again later.
            RequestError: The engine refuses it.
            BackboneError: Its prefix does not fit the backbone.
        """
        with self._changed:
            if not self._accepting:
                raise EngineFull("the engine takes no more requests: it is being closed.", hint="ask another replica.")
            if self._broken:
                raise EngineFull("the engine is being made anew.", hint="try again later.")
            # Refuses a name in use, so that nobody's entry is overwritten below.
            self.engine.add(request)
            live = self._live[request.id] = _Live(on_output, set(range(request.n)))
            if deadline is not None:
                heapq.heappush(self._deadlines, (time.monotonic() + deadline, next(self._numbers), request.id, live))
            self._changed.notify_all()

    def cancel(self, request_id: str) -> None:
        """Give a request up; its texts end with `cancelled`. Unknown names are passed over."""
        with self._changed:
            self.engine.cancel(request_id)
            self._changed.notify_all()

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests, and wait until all are done and all news is delivered.

        Returns:
            Whether that was reached within `timeout` seconds.
        """
        end = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._accepting = False
            if not self._changed.wait_for(lambda: not self._live, timeout):
                return False
        delivered = threading.Event()
        self._news.put(delivered)
        while not delivered.wait(0.02):
            if end is not None and time.monotonic() > end:
                return False
            if not self._threads[1].is_alive():
                break
        return True

    def close(self, timeout: float = 10.0) -> None:
        """Give up what is still running, and stop; waits at most `timeout` seconds for a step or for slow callers."""
        with self._changed:
            self._accepting, self._closing = False, True
            for name in self._live:
                self.engine.cancel(name)
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
        """Whether requests are computed: its threads live, and the engine is not being made anew."""
        return not self._broken and all(thread.is_alive() for thread in self._threads)

    @property
    def num_live(self) -> int:
        """Requests whose end was not told yet."""
        return len(self._live)

    def snapshot(self) -> Snapshot:
        """What the engine is at."""
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
            try:
                outputs = self.engine.step()
            except BaseException as error:
                _log.exception("the engine broke; it is made anew.")
                self._restart(error)
                continue
            self._note(outputs)
        self._news.put(None)

    def _wait_for_work(self) -> bool:
        """Wait until there is something to compute; False: the worker is to end."""
        with self._changed:
            while True:
                if self._closing and (self._broken or not self.engine.busy):
                    return False
                self._expire()
                if self.engine.busy:
                    return True
                self._changed.wait()

    def _expire(self) -> None:
        """Give up the requests whose time is over; the lock is held."""
        now = time.monotonic()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, name, live = heapq.heappop(self._deadlines)
            if self._live.get(name) is live:
                self.engine.cancel(name, "timeout")
        # Those of requests that ended in time are dropped before they pile up.
        if len(self._deadlines) > 2 * len(self._live) + 100:
            self._deadlines = [entry for entry in self._deadlines if self._live.get(entry[2]) is entry[3]]
            heapq.heapify(self._deadlines)

    def _note(self, outputs: list[SequenceOutput]) -> None:
        with self._changed:
            if self.engine.batch_size:
                self._steps += 1
                self._batch_sizes[self.engine.batch_size] += 1
            for output in outputs:
                self._tokens += len(output.tokens)
                self._tell(output)
            self._changed.notify_all()

    def _tell(self, output: SequenceOutput) -> None:
        """Pass news on; the lock is held."""
        live = self._live.get(output.request_id)
        if live is None:
            return
        if output.finish_reason is not None:
            live.open.discard(output.index)
            if not live.open:
                del self._live[output.request_id]
        self._news.put((live, output))

    def _restart(self, error: BaseException) -> None:
        """End all requests and make a new engine."""
        told = f"the engine broke and was made anew ({type(error).__name__}): send the request again."
        with self._changed:
            self._broken = True
            self._restarts += 1
            for name, live in list(self._live.items()):
                for index in sorted(live.open):
                    self._tell(SequenceOutput(name, index, (), "", "error", told, engine_crashed=True))
            self._changed.notify_all()
        pause = 0.05
        while not self._closing:
            try:
                made = Engine(self.engine.backbone, self.engine.config)
            except Exception:
                _log.exception("the engine cannot be made anew yet.")
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                continue
            with self._changed:
                self.engine, self._broken = made, False
            return

    def _deliver(self) -> None:
        while (news := self._news.get()) is not None:
            if isinstance(news, threading.Event):
                news.set()
                continue
            live, output = news
            if not live.heard:
                continue
            try:
                live.on_output(output)
            except BaseException:
                _log.exception("whoever asked for %s cannot take its news; it is given up.", output.request_id)
                live.heard = False
                with self._changed:
                    self._failed_callbacks += 1
                self.cancel(output.request_id)
