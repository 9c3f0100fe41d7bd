"""An engine whose texts another program's server generates: one text in each slot, the others wait in fair order."""

from __future__ import annotations

import abc
import contextlib
import hashlib
import http.client
import itertools
import logging
import math
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from prefixtune.backbone.backbone import Backbone
from prefixtune.engine.base import Limits, Receive, RunningSequence, Snapshot
from prefixtune.engine.remote_server import Refused, RemoteServer
from prefixtune.engine.request import EngineFull, FinishReason, Request, SequenceOutput
from prefixtune.errors import BackboneError, RequestError
from prefixtune.prefix.prefix import Prefix
from prefixtune.sampling.detokenizer import Detokenizer

__all__ = ["RemoteEngine", "RemoteSlot", "RemoteText"]


_log = logging.getLogger(__name__)
_CONTEXT_TOKENS = 4
"""Tokens of a prompt with which the first generated tokens are decoded."""
_PATIENCE = 0.2
"""Seconds between looks at deadlines and at the server."""
_UNREACHABLE = (OSError, http.client.HTTPException)


@dataclass(eq=False)
class RemoteText:
    """One text of a request.

    Attributes:
        request: The request.
        index: Which of its texts.
        receive: Gets its outputs.
        deadline: By the monotonic clock.
        state: Its prefix as the server takes it; None: there is no prefix.
        num_new_tokens: Tokens generated so far.
        ended: Why it ends early; None: it does not.
        connection: On which it comes; None: not yet.
    """

    request: Request
    index: int
    receive: Receive
    deadline: float
    state: Any
    num_new_tokens: int = 0
    ended: FinishReason | None = None
    connection: socket.socket | None = None

    def opened(self, connection: socket.socket) -> None:
        """It can be interrupted by this connection."""
        self.connection = connection
        if self.ended is not None:
            raise InterruptedError("it was interrupted")

    def interrupt(self, reason: FinishReason) -> None:
        """End it early, from any thread."""
        self.ended = self.ended or reason
        if (connection := self.connection) is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def seed(self) -> int | None:
        """Its own seed of 32 bits, whose last number stands for none in llama.cpp; None: the request has none."""
        if self.request.sampling.seed is None:
            return None
        digest = hashlib.sha256(f"{self.request.sampling.seed} {self.index}".encode()).digest()
        return int.from_bytes(digest[:8], "little") % (2**32 - 1)


@dataclass(eq=False)
class RemoteSlot:
    """A place for one running text, and the prefix whose state it holds, if the program keeps such."""

    number: int
    state: Any = None
    used: float = 0.0
    text: RemoteText | None = None


class RemoteEngine(Limits, abc.ABC):
    """Gives texts to a server, each in a slot's thread; starts the server again, once, if it dies.

    A subclass calls `_run` when its server may be started.

    Args:
        name: What computes.
        backbone: The model's tokenizer and shapes; its weights are not used.
        num_slots: Texts that run at once.

    Attributes:
        name: See `base.Engine`, as for the others.
        backbone: The backbone.
        failed: The server has ended and could not be started again.
        on_failure: Called then.
        restarts: How often it was started again.
        max_length: Most positions of a text.
        lacks: Sampling parameters that it refuses -> the value that asks for nothing.
    """

    def __init__(self, name: str, backbone: Backbone, num_slots: int) -> None:
        self.name, self.backbone = name, backbone
        self.on_failure: Callable[[], None] = lambda: None
        self.failed = self._closing = False
        self.restarts = self._tokens = 0
        self._slots = [RemoteSlot(number) for number in range(num_slots)]
        self._waiting: dict[str, deque[RemoteText]] = {}
        # Of each request, the texts that have not ended.
        self._texts: dict[str, list[RemoteText]] = {}
        # Nothing slow happens while it is held, and no callback is called.
        self._changed = threading.Condition(threading.RLock())
        self._threads: list[threading.Thread] = []

    # --- for subclasses -----------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _start(self) -> RemoteServer:
        """Start the server, or find it.

        Raises:
            PrefixError: It cannot be used.
        """

    @abc.abstractmethod
    def _take(self, prefix: Prefix) -> Any:
        """A prefix as the server takes it; it is kept until `_release`."""

    @abc.abstractmethod
    def _release(self, state: Any) -> None:
        """A text has ended, and needs it no more."""

    @abc.abstractmethod
    def _generate(
        self, server: RemoteServer, slot: RemoteSlot, text: RemoteText, pieces: Detokenizer, ends: set[int]
    ) -> FinishReason:
        """Generate a text, and deliver what comes by `_deliver`.

        Args:
            server: Where.
            slot: Its slot.
            text: The text.
            pieces: Its tokens as text.
            ends: Tokens that end it.

        Returns:
            Why it ended.
        """

    def _run(self) -> None:
        """Start the server and the threads."""
        self._server = self._start()
        self._threads = [threading.Thread(target=self._watch, name=f"prefixtune-{self.name}", daemon=True)]
        self._threads += [threading.Thread(target=self._serve, args=(slot,), daemon=True) for slot in self._slots]
        for thread in self._threads:
            thread.start()

    # --- for callers --------------------------------------------------------------------------------------------------

    @property
    def healthy(self) -> bool:
        """Whether requests are computed."""
        return not self.failed and not self._closing and self._server.alive

    @property
    def num_unfinished(self) -> int:
        """Requests that have not ended."""
        return len(self._texts)

    def submit(self, request: Request, receive: Receive, deadline: float | None = None) -> None:
        """Submit a request (see `base.Engine`)."""
        self.check(request)
        end = math.inf if deadline is None else time.monotonic() + deadline
        with self._changed:
            if not self.healthy:
                raise EngineFull(f"{self.name} is not running.", hint="try again later.")
            if request.id in self._texts:
                raise RequestError(f"a request {request.id!r} is running already.", hint="give each its own id.")
            texts = self._texts[request.id] = [
                RemoteText(request, index, receive, end, None) for index in range(request.n)
            ]
        try:
            for text in texts:
                text.state = None if request.prefix is None else self._take(request.prefix)
        except BaseException:
            with self._changed:
                del self._texts[request.id]
            for text in texts:
                if text.state is not None:
                    self._release(text.state)
            raise
        with self._changed:
            self._waiting.setdefault(request.tenant, deque()).extend(list(texts))
            self._assign()
            is_late = self._closing
        if is_late:
            self._interrupt(texts, "cancelled")

    def cancel(self, request_id: str) -> None:
        """Cancel a request; its texts end with `cancelled`. Unknown ids are ignored."""
        self._interrupt(self._texts.get(request_id, ()), "cancelled")

    def snapshot(self) -> Snapshot:
        """What the engine is doing now, and its counters."""
        with self._changed:
            running = [(slot.number, slot.text) for slot in self._slots if slot.text is not None]
            shown = tuple(RunningSequence.of(text.request, number, text.num_new_tokens) for number, text in running)
            waiting = sum(map(len, self._waiting.values()))
        return Snapshot(shown, waiting, steps=0, texts=0, tokens=self._tokens)

    def close(self, timeout: float = 10.0) -> None:
        """Cancel what still runs, and stop."""
        with self._changed:
            self._closing = True
            texts = list(itertools.chain.from_iterable(self._texts.values()))
            self._changed.notify_all()
        self._interrupt(texts, "cancelled")
        end = time.monotonic() + timeout
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, end - time.monotonic()))
        self._server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, value: object, trace: TracebackType | None) -> None:
        self.close()

    # --- which text runs where ----------------------------------------------------------------------------------------

    def _assign(self) -> None:
        """Give free slots to waiting texts, one tenant after the other; the lock is held."""
        while self._waiting and (free := [slot for slot in self._slots if slot.text is None]):
            tenant = next(iter(self._waiting))
            texts = self._waiting.pop(tenant)
            text = texts.popleft()
            if texts:
                # Behind the other tenants.
                self._waiting[tenant] = texts
            # One that holds its prefix, or else the one that was used least recently.
            min(free, key=lambda slot: (slot.state is not text.state or text.state is None, slot.used)).text = text
        self._changed.notify_all()

    def _interrupt(self, texts: Iterable[RemoteText], reason: FinishReason) -> None:
        """End texts early."""
        waited = []
        with self._changed:
            for text in list(texts):
                text.interrupt(reason)
                queue = self._waiting.get(text.request.tenant, deque())
                if text in queue:
                    queue.remove(text)
                    waited.append(text)
            self._waiting = {tenant: queue for tenant, queue in self._waiting.items() if queue}
        for text in waited:
            self._end(text, reason)

    def _end(self, text: RemoteText, reason: FinishReason, words: str = "", **details: Any) -> None:
        """Tell the caller that a text has ended; the lock is not held."""
        with self._changed:
            texts = self._texts[text.request.id]
            texts.remove(text)
            if not texts:
                del self._texts[text.request.id]
        if text.state is not None:
            self._release(text.state)
        self._deliver(text, SequenceOutput(text.request.id, text.index, (), words, reason, **details))

    def _deliver(self, text: RemoteText, output: SequenceOutput) -> None:
        self._tokens += len(output.tokens)
        try:
            text.receive(output)
        except Exception:
            _log.exception("the callback of request %s failed; the request is cancelled.", text.request.id)
            with self._changed:
                for one in (text, *self._texts.get(text.request.id, ())):
                    one.receive = _ignore
            self.cancel(text.request.id)

    def _serve(self, slot: RemoteSlot) -> None:
        """Run the texts of a slot, one after the other."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: slot.text is not None or self._closing)
                if (text := slot.text) is None:
                    return
            server, sampling = self._server, text.request.sampling
            context = text.request.prompt[-_CONTEXT_TOKENS:]
            pieces = Detokenizer(self.backbone.decode, sampling.stop, verbatim=text.request.verbatim, context=context)
            try:
                reason: FinishReason = "length"
                if text.ended is None and sampling.max_new_tokens:
                    ends = {self.backbone.eos_id, *sampling.end_ids}
                    reason = self._generate(server, slot, text, pieces, ends)
                self._end(text, text.ended or reason, pieces.finish())
            except Exception as error:
                slot.state = None
                self._fail(server, text, error)
            with self._changed:
                slot.text, slot.used, text.connection = None, time.monotonic(), None
                self._assign()

    def _fail(self, server: RemoteServer, text: RemoteText, error: Exception) -> None:
        """End a text that was interrupted, or whose server refused it or has ended."""
        if text.ended is None and not isinstance(error, (RequestError, *_UNREACHABLE)):
            _log.error("request %s failed", text.request.id, exc_info=error)
        self._end(
            text,
            text.ended or "error",
            error=str(error) or type(error).__name__,
            engine_crashed=text.ended is None and isinstance(error, _UNREACHABLE) and server.is_dying(),
            refused=isinstance(error, Refused) and text.request.grammar is not None,
        )

    # --- the server ---------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """End texts whose deadline has passed; start the server again if it is gone."""
        while not self.failed:
            with self._changed:
                if self._changed.wait_for(lambda: self._closing, _PATIENCE):
                    return
                now = time.monotonic()
                late = [text for texts in self._texts.values() for text in texts if text.deadline <= now]
            self._interrupt(late, "timeout")
            if not self._server.look():
                self._restart()

    def _restart(self) -> None:
        """Start the server once more; nothing is submitted meanwhile, and what runs or waits fails."""
        is_ours = bool(self._server.pid)
        if is_ours or not self.restarts:
            _log.error("the server of %s has ended.", self.name)
        self._server.close()
        try:
            if is_ours and self.restarts:
                raise BackboneError(f"the server of {self.name} has ended twice.", hint="start it again.")
            self.restarts += 1
            server = self._start()
        except Exception as error:
            if is_ours:
                _log.error("%s", error)
                self.failed = True
                self.on_failure()
            # One that somebody else runs may come back.
            return
        with self._changed:
            for slot in self._slots:
                slot.state = None
            self._server = server
            if self._closing:
                server.close()


def _ignore(output: SequenceOutput) -> None:
    """What becomes of the outputs after a callback failed."""
