"""An engine whose texts another program's server generates: one text in each slot, the others wait in fair order."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import itertools
import logging
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.prefixes import make_header
from prefixtune.engine.base import CLOSE_SECONDS, Engine, Receive, RunningSequence, Snapshot
from prefixtune.engine.prefix_files import PrefixFile, PrefixFiles, own_folder
from prefixtune.engine.remote_server import Refused, RemoteServer
from prefixtune.engine.request import EngineFull, FinishReason, Request, SequenceOutput, Token
from prefixtune.engine.scheduler import FairQueue
from prefixtune.errors import BackboneError, RequestError
from prefixtune.prefix.prefix import Prefix
from prefixtune.sampling.detokenizer import Detokenizer

_log = logging.getLogger(__name__)
_PATIENCE = 0.3
"""Seconds between looks at the server."""
SAMPLERS = ("temperature", "top_k", "top_p", "min_p")
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
"""Sampling parameters that other programs call as we do."""


class PrefixNotUsed(RequestError):
    """The server read a prefix's placeholders as text."""


@dataclass(eq=False)
class RemoteSlot:
    """A place for one running text, and the prefix that the program may keep there."""

    number: int
    file: PrefixFile | None = None
    used: float = 0.0
    text: RemoteText | None = None


@dataclass(eq=False)
class RemoteText:
    """One text of a request.

    Attributes:
        request: The request.
        index: Which of its texts.
        receive: Gets its outputs.
        deadline: By the monotonic clock; None: there is none.
        file: Its prefix as the server takes it; None: there is no prefix.
        pieces: Its tokens as text.
        ends: Tokens that end it.
        slot: Its slot; None: it waits.
        turn: Set once it has a slot.
        task: Writes it.
        num_new_tokens: Tokens generated so far.
    """

    request: Request
    index: int
    receive: Receive
    deadline: float | None
    file: PrefixFile | None
    pieces: Detokenizer
    ends: set[int]
    slot: RemoteSlot | None = None
    turn: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[tuple[FinishReason, str]] | None = None
    num_new_tokens: int = 0

    def interrupt(self) -> None:
        """End it early."""
        if self.task is not None:
            self.task.cancel()

    @property
    def seed(self) -> int | None:
        """Its own; None: the request has none."""
        seed = self.request.sampling.seed
        return None if seed is None else random.Random(f"{seed}/{self.index}").getrandbits(31)


class RemoteEngine(Engine):
    """Gives texts to a server, each by a task of an event loop; starts the server again, once, if it dies.

    The loop runs in a thread of its own, and only there does anything change but `_texts`.

    Args:
        name: What computes.
        backbone: The model's tokenizer and shapes; its weights are not used.
        num_slots: Texts that run at once.
        folder: Of the prefixes' files; None: one of its own.

    Attributes:
        restarts: How often the server was started again.
    """

    def __init__(self, name: str, backbone: Backbone, num_slots: int, folder: Path | None = None) -> None:
        self.name, self.backbone = name, backbone
        self._closing, self._trouble = False, ""
        self.restarts = self._tokens = 0
        self._slots = [RemoteSlot(number) for number in range(num_slots)]
        self._queue = FairQueue[RemoteText]()
        # Of each request, the texts that have not ended; guarded by the lock, as is the order of calls in the loop.
        self._texts: dict[str, list[RemoteText]] = {}
        self._lock = threading.Lock()
        started: Future[None] = Future()
        with contextlib.ExitStack() as made:
            self._files = PrefixFiles(folder or made.enter_context(own_folder()), self._write_file)
            made.callback(self._files.close)
            self._loop = asyncio.new_event_loop()
            # What a library's callbacks find where a text was cancelled is no news for a terminal.
            self._loop.set_exception_handler(lambda _, context: _log.debug("%s", context["message"]))
            self._working = self._loop.create_task(self._work(started))
            self._thread = threading.Thread(target=self._run, name=f"prefixtune-{name}", daemon=True)
            self._thread.start()
            made.callback(self._stop)
            started.result()
            self.backbone = replace(backbone, most_positions=self.max_length)
            self._made = made.pop_all()

    # --- for subclasses -----------------------------------------------------------------------------------------------

    @abc.abstractmethod
    async def _start(self) -> RemoteServer:
        """Start the server, or find it.

        Raises:
            PrefixError: It cannot be used.
        """

    @abc.abstractmethod
    def _write_file(self, path: Path, prefix: Prefix) -> Any:
        """Write a prefix's file, and return what stands for it in a request."""

    @abc.abstractmethod
    async def _generate(self, server: RemoteServer, text: RemoteText) -> FinishReason:
        """Generate a text, which has a slot, and deliver what comes by `_take`; returns why it ended."""

    def _zero_prefix(self, length: int) -> Prefix:
        """A prefix that a server is tried with."""
        layers = tuple(
            (torch.zeros(one.num_kv_heads, length, one.key_dim), torch.zeros(one.num_kv_heads, length, one.value_dim))
            for one in self.backbone.geometry["decoder"]
        )
        return Prefix({"decoder": layers}, make_header(self.backbone))

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
        end = None if deadline is None else time.monotonic() + deadline
        file = None if request.prefix is None else self._files.take(request.prefix)
        try:
            with self._lock:
                if not self.healthy:
                    raise EngineFull(f"{self.name} is not running.", hint="try again later.")
                if request.id in self._texts:
                    raise RequestError(f"a request {request.id!r} is running already.", hint="give each its own id.")
                ends = {self.backbone.eos_id, *request.sampling.end_ids}
                texts = [
                    RemoteText(request, index, receive, end, file, request.detokenizer(self.backbone), ends)
                    for index in range(request.n)
                ]
                self._texts[request.id] = texts
                for text in tuple(texts):
                    self._loop.call_soon_threadsafe(self._begin, text)
        except BaseException:
            if file is not None:
                self._files.release(file)
            raise

    def cancel(self, request_id: str) -> None:
        """Cancel a request; its texts end with `cancelled`. Unknown ids are ignored."""
        with self._lock:
            for text in self._texts.get(request_id, ()):
                self._loop.call_soon_threadsafe(text.interrupt)

    def snapshot(self) -> Snapshot:
        """What the engine is doing now, and its counters."""
        texts = ((slot.number, text) for slot in self._slots if (text := slot.text) is not None)
        running = tuple(RunningSequence(number, text.request, text.num_new_tokens) for number, text in texts)
        return Snapshot(running, len(self._queue), steps=0, texts=0, tokens=self._tokens)

    def close(self) -> None:
        """Cancel what still runs, and stop (see `base.Engine`)."""
        self._made.close()

    def _stop(self) -> None:
        with self._lock:
            # It has ended already where the server did not start.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._working.cancel)
            self._closing = True
        if self._thread is not threading.current_thread():
            self._thread.join(CLOSE_SECONDS)

    # --- texts, in the loop -------------------------------------------------------------------------------------------

    def _begin(self, text: RemoteText) -> None:
        self._queue.add(text)
        text.task = self._loop.create_task(self._write(text))
        text.task.add_done_callback(lambda task: self._end(text, task))
        self._assign()

    def _assign(self) -> None:
        """Give free slots to waiting texts."""
        while len(self._queue) and (free := [slot for slot in self._slots if slot.text is None]):
            text = self._queue.first()
            self._queue.take(text)
            # One that holds its prefix, or else the one that was used least recently.
            text.slot = min(free, key=lambda slot: (slot.file is not text.file or text.file is None, slot.used))
            text.slot.text = text
            text.turn.set()

    async def _write(self, text: RemoteText) -> tuple[FinishReason, str]:
        """Wait for a slot, and generate a text: why it ended, and its last words."""
        async with asyncio.timeout_at(text.deadline):
            await text.turn.wait()
            server = self._server
            if not text.request.sampling.max_new_tokens:
                return "length", ""
            try:
                reason = await self._generate(server, text)
            except ConnectionError as error:
                if await server.is_dying():
                    raise _ServerDied(str(error)) from error
                raise
        return reason, text.pieces.finish()

    def _end(self, text: RemoteText, task: asyncio.Task[tuple[FinishReason, str]]) -> None:
        """Free a text's slot, and tell its caller that it has ended."""
        succeeded = not task.cancelled() and task.exception() is None
        self._queue.release(text, has_slot=text.slot is not None)
        if (slot := text.slot) is not None:
            slot.text, slot.used = None, time.monotonic()
            # Whatever it holds now.
            slot.file = slot.file if succeeded else None
        with self._lock:
            texts = self._texts[text.request.id]
            texts.remove(text)
            if not texts:
                del self._texts[text.request.id]
                if text.file is not None:
                    self._files.release(text.file)
        end = SequenceOutput(text.request.id, text.index, (), "")
        try:
            reason, words = task.result()
            end = replace(end, text=words, finish_reason=reason)
        except asyncio.CancelledError:
            end = replace(end, finish_reason="cancelled")
        except TimeoutError:
            end = replace(end, finish_reason="timeout")
        except Exception as error:
            if not isinstance(error, RequestError | OSError):
                _log.error("request %s failed", text.request.id, exc_info=error)
            is_refused = isinstance(error, Refused) and text.request.grammar is not None
            crashed = isinstance(error, _ServerDied)
            why = str(error) or type(error).__name__
            end = replace(end, finish_reason="error", error=why, engine_crashed=crashed, refused=is_refused)
        self._give(text, end)
        self._assign()

    def _take(self, text: RemoteText, tokens: Sequence[Token]) -> bool:
        """Deliver tokens up to one that ends the text; whether that one or a stop string has ended it."""
        kept = tuple(itertools.takewhile(lambda token: token.id not in text.ends, tokens))
        self._tokens += len(kept)
        words = text.pieces.add(*(token.id for token in kept))
        if kept or words:
            self._give(text, SequenceOutput(text.request.id, text.index, kept, words))
        return len(kept) < len(tokens) or text.pieces.stopped

    def _check_cached(self, text: RemoteText, cached: int | None) -> None:
        """Refuse a text whose placeholders were read as text; None: the server does not say how many were not.

        Raises:
            PrefixNotUsed: It was read so.
        """
        length = text.request.prefix_length
        if cached is not None and cached < length:
            message = f"{self.name} did not use the prefix: {cached} of {length} positions."
            raise PrefixNotUsed(message, hint="send the request again.")

    # --- the server, in the loop --------------------------------------------------------------------------------------

    def _run(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._working)
        self._loop.close()

    async def _work(self, started: Future[None]) -> None:
        """Start the server, and start it again if it is gone."""
        try:
            self._server = await self._start()
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(None)
        try:
            while True:
                await asyncio.sleep(_PATIENCE)
                if not self.failed and not await self._server.look():
                    await self._restart()
        except Exception:
            _log.exception("the engine %s has failed.", self.name)
            self._fail()
        finally:
            tasks = [text.task for text in itertools.chain(*self._texts.values()) if text.task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._server.close()

    async def _restart(self) -> None:
        """Start the server once more; nothing is submitted meanwhile, and what runs or waits fails."""
        is_ours = self._server.process is not None
        if is_ours or not self.restarts:
            _log.error("the server of %s has ended.", self.name)
        await self._server.close()
        try:
            if is_ours and self.restarts:
                raise BackboneError(f"the server of {self.name} has ended twice.", hint="start it again.")
            self.restarts += 1
            self._server = await self._start()
        except Exception as error:
            if str(error) != self._trouble:
                self._trouble = str(error)
                _log.error("%s", error)
            # One that somebody else runs may come back.
            if is_ours:
                self._fail()
        for slot in self._slots:
            slot.file = None

    def _fail(self) -> None:
        self.failed = True
        self.on_failure()


class _ServerDied(OSError):
    """The server has ended, and with it all texts."""
