"""llama.cpp behind the interface of every engine: a slot per text, with the prefix restored into it.

llama.cpp's server runs as a child process. A prefix is a saved state of a slot; in the prompt, P placeholder tokens
stand for it. Every answer's `timings.cache_n` says whether the slot held them: without that, llama.cpp would read the
placeholders as text.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import itertools
import json
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.plain_layers import check_plain_layers
from prefixtune.engine.base import Limits, Receive, RunningSequence, Snapshot
from prefixtune.engine.gguf import find_gguf
from prefixtune.engine.llama_child import LlamaChild, Refused
from prefixtune.engine.llama_state import SavedState, SavedStates, is_interleaved, probe_file
from prefixtune.engine.request import EngineFull, FinishReason, Request, SequenceOutput, Token
from prefixtune.errors import BackboneError, ConfigError, RequestError
from prefixtune.sampling.detokenizer import Detokenizer
from prefixtune.utils.extras import needs_extra
from prefixtune.utils.files import reporting_write_errors, work_folder
from prefixtune.utils.folders import cache_folder
from prefixtune.utils.machine import num_cores

__all__ = ["LlamaCppEngine"]


_log = logging.getLogger(__name__)
_DEFAULT_LENGTH = 4096
_MOST_SLOTS = 256
"""LLAMA_MAX_SEQ of llama.cpp."""
_CONTEXT_TOKENS = 4
"""Tokens of a prompt with which the first generated tokens are decoded."""
_PATIENCE = 0.2
"""Seconds between looks at deadlines and at the child process."""
_LACKS = MappingProxyType(
    {
        "min_new_tokens": 0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "prompt_logprobs": None,
    }
)
"""What llama.cpp lacks, or counts over the placeholders too -> the values that ask for nothing."""
_UNREACHABLE = (OSError, http.client.HTTPException)


@dataclass(eq=False)
class _Text:
    """One text of a request."""

    request: Request
    index: int
    receive: Receive
    deadline: float
    state: SavedState | None
    num_new_tokens: int = 0
    ended: FinishReason | None = None


@dataclass(eq=False)
class _Slot:
    """A slot of llama.cpp's server, the prefix whose state it holds, and the text that runs in it."""

    number: int
    state: SavedState | None = None
    used: float = 0.0
    text: _Text | None = None


class LlamaCppEngine(Limits):
    """Generates text by llama.cpp, for a decoder-only model whose keys were compared with llama.cpp's.

    Args:
        backbone: The model's tokenizer and shapes, by `load_shapes`; its weights are not used.
        gguf: The model's weights: any quantization of the backbone; empty: the file of an embedded backbone.
        num_slots: Texts that run at once.
        max_length: Most positions of a text, prefix included; 0: the backbone's limit, at most 4,096.
        threads: Of the processor; 0: one per core. Beside another busy program, fewer are faster.

    Attributes:
        name: What computes, with the weights' quantization.
        failed: llama.cpp's server has ended and could not be started again.
        on_failure: Called then.
        restarts: How often it was started again; once at most.

    Raises:
        BackboneError: The file is missing or holds another model, or llama.cpp cannot use it, or no prefixes of this
            model type.
        ConfigError: `xllamacpp` is missing, this build does not restore states, or there are too many slots.
        PrefixError: The cache folder cannot be written.
    """

    def __init__(
        self, backbone: Backbone, gguf: str = "", *, num_slots: int = 8, max_length: int = 0, threads: int = 0
    ) -> None:
        with needs_extra("llama", "the engine llama.cpp"):
            import xllamacpp  # noqa: F401
        is_interleaved(backbone)
        if not 1 <= num_slots <= _MOST_SLOTS:
            raise ConfigError(f"num_slots is {num_slots}, but llama.cpp has 1 to {_MOST_SLOTS}.", hint="ask for fewer.")
        limits = (max_length or _DEFAULT_LENGTH, backbone.max_positions)
        self.backbone, self.max_length = backbone, min(limit for limit in limits if limit)
        check_plain_layers(backbone, "llama.cpp", self.max_length)
        path, quantization = find_gguf(gguf, backbone)
        self.name = f"llama.cpp ({quantization or 'unknown quantization'})"
        self.lacks: Mapping[str, Any] = _LACKS
        self.on_failure: Callable[[], None] = lambda: None
        self.failed = self._closing = False
        self.restarts = self._tokens = 0
        self._slots = [_Slot(number) for number in range(num_slots)]
        self._waiting: dict[str, deque[_Text]] = {}
        # Of each request, the texts that have not ended.
        self._texts: dict[str, list[_Text]] = {}
        # Nothing slow happens while it is held, and no callback is called.
        self._changed = threading.Condition(threading.RLock())
        parent = cache_folder() / "llama.cpp"
        with contextlib.ExitStack() as made:
            with reporting_write_errors(parent):
                parent.mkdir(parents=True, exist_ok=True)
                folder = made.enter_context(work_folder(parent, "states"))
            options = (path, num_slots, self.max_length, threads or num_cores(), folder)
            self._start: Callable[[], LlamaChild] = lambda: LlamaChild(*options)
            self._child = self._start()
            made.callback(lambda: self._child.close())
            self._states = SavedStates(folder, backbone, self._probe(folder))
            self._made = made.pop_all()
        self._threads = [threading.Thread(target=self._watch, name="prefixtune-llama", daemon=True)]
        self._threads += [threading.Thread(target=self._serve, args=(slot,), daemon=True) for slot in self._slots]
        for thread in self._threads:
            thread.start()

    # --- for callers --------------------------------------------------------------------------------------------------

    @property
    def healthy(self) -> bool:
        """Whether requests are computed."""
        return not self.failed and not self._closing and self._child.alive

    @property
    def vocab_size(self) -> int:
        """Tokens that the model can read."""
        return self.backbone.vocab_size

    @property
    def cache_bytes(self) -> int:
        """Memory for keys and values of all running texts, in float16."""
        return 2 * len(self._slots) * self.max_length * sum(shape.size for shape in self.backbone.geometry["decoder"])

    @property
    def num_unfinished(self) -> int:
        """Requests that have not ended."""
        return len(self._texts)

    def submit(self, request: Request, receive: Receive, deadline: float | None = None) -> None:
        """Submit a request (see `base.Engine`).

        Raises:
            ConfigError: Its prefix has numbers that llama.cpp cannot hold.
        """
        self.check(request)
        state = None if request.prefix is None else self._states.of(request.prefix)
        end = math.inf if deadline is None else time.monotonic() + deadline
        with self._changed:
            if not self.healthy:
                raise EngineFull("llama.cpp is not running.", hint="try again later.")
            if request.id in self._texts:
                raise RequestError(f"a request {request.id!r} is running already.", hint="give each its own id.")
            texts = [_Text(request, index, receive, end, state) for index in range(request.n)]
            self._texts[request.id] = list(texts)
            self._waiting.setdefault(request.tenant, deque()).extend(texts)
            self._assign()

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
        self._made.close()

    def __enter__(self) -> LlamaCppEngine:
        return self

    def __exit__(self, *details: object) -> None:
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

    def _interrupt(self, texts: Iterable[_Text], reason: FinishReason) -> None:
        """End texts early: those that wait at once, those that run after their next token."""
        waited = []
        with self._changed:
            for text in list(texts):
                text.ended = text.ended or reason
                queue = self._waiting.get(text.request.tenant, deque())
                if text in queue:
                    queue.remove(text)
                    waited.append(text)
            self._waiting = {tenant: queue for tenant, queue in self._waiting.items() if queue}
        for text in waited:
            self._end(text, reason)

    def _end(self, text: _Text, reason: FinishReason, words: str = "", **details: Any) -> None:
        """Tell the caller that a text has ended; the lock is not held."""
        with self._changed:
            texts = self._texts[text.request.id]
            texts.remove(text)
            if not texts:
                del self._texts[text.request.id]
        self._deliver(text, SequenceOutput(text.request.id, text.index, (), words, reason, **details))

    def _deliver(self, text: _Text, output: SequenceOutput) -> None:
        try:
            text.receive(output)
        except Exception:
            _log.exception("the callback of request %s failed; the request is cancelled.", text.request.id)
            with self._changed:
                for one in (text, *self._texts.get(text.request.id, ())):
                    one.receive = _ignore
            self.cancel(text.request.id)

    # --- a slot's thread ----------------------------------------------------------------------------------------------

    def _serve(self, slot: _Slot) -> None:
        """Run the texts of a slot, one after the other."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: slot.text is not None or self._closing)
                if (text := slot.text) is None:
                    return
            child = self._child
            try:
                reason, words = self._run(child, slot, text)
                self._end(text, reason, words)
            except Exception as error:
                slot.state = None
                if not isinstance(error, RequestError | OSError | http.client.HTTPException):
                    _log.exception("request %s failed", text.request.id)
                self._end(
                    text,
                    text.ended or "error",
                    error=str(error) or type(error).__name__,
                    engine_crashed=isinstance(error, _UNREACHABLE) and child.is_dying(),
                    refused=isinstance(error, Refused) and text.request.grammar is not None,
                )
            with self._changed:
                slot.text, slot.used = None, time.monotonic()
                self._assign()

    def _run(self, child: LlamaChild, slot: _Slot, text: _Text) -> tuple[FinishReason, str]:
        """Generate a text in a slot; returns why it ended, and its last words."""
        request, sampling = text.request, text.request.sampling
        if text.ended is not None or not sampling.max_new_tokens:
            return text.ended or "length", ""
        if slot.state is not text.state:
            slot.state = None
            if text.state is not None:
                self._states.ensure(text.state)
                child.ask(f"/slots/{slot.number}?action=restore", {"filename": text.state.path.name})
                slot.state = text.state
        placeholders = [] if text.state is None else text.state.placeholders
        context = request.prompt[-_CONTEXT_TOKENS:]
        pieces = Detokenizer(self.backbone.decode, sampling.stop, verbatim=request.verbatim, context=context)
        ends = {self.backbone.eos_id, *sampling.end_ids}
        body = {"prompt": [*placeholders, *request.prompt], "id_slot": slot.number, **_options(text)}
        reason: FinishReason = "length"
        with contextlib.closing(child.stream(body)) as events:
            for event in events:
                cached = int(event["timings"]["cache_n"])
                if cached < len(placeholders):
                    raise RequestError(
                        f"llama.cpp did not use the prefix: {cached} of {len(placeholders)} positions.",
                        hint="send the request again.",
                    )
                if event["stop"]:
                    reason = "stop" if event["stop_type"] == "eos" else "length"
                    break
                count = int(event["tokens_predicted"]) - text.num_new_tokens
                tokens, is_last = self._tokens_of(event, ends, sampling.logprobs, count)
                text.num_new_tokens += count
                self._tokens += count
                words = pieces.add(*(token.id for token in tokens))
                if tokens or words:
                    self._deliver(text, SequenceOutput(request.id, text.index, tokens, words))
                if is_last or pieces.stopped:
                    reason = "stop"
                    break
                if text.ended is not None:
                    break
        return text.ended or reason, pieces.finish()

    def _tokens_of(
        self, event: Mapping[str, Any], ends: set[int], logprobs: int | None, count: int
    ) -> tuple[tuple[Token, ...], bool]:
        """An event's tokens up to one that ends the text, and whether there is one."""
        ids = [int(token) for token in event["tokens"]]
        if ids and ids[-1] not in ends and count > len(ids):
            # Of a character of several tokens, only the last one is said: those that the tokenizer makes of it. Some
            # tokenizers put a space in front.
            ids = self.backbone.encode(event["content"])[-count:] or ids
        found = {}
        for entry in event.get("completion_probabilities", ()):
            best = tuple((int(top["id"]), float(top["logprob"])) for top in entry["top_logprobs"][:logprobs])
            found[int(entry["id"])] = Token(int(entry["id"]), float(entry["logprob"]), best)
        kept = list(itertools.takewhile(lambda token: token not in ends, ids))
        return tuple(found.get(token, Token(token)) for token in kept), len(kept) < len(ids)

    # --- the child process --------------------------------------------------------------------------------------------

    def _probe(self, folder: Path) -> int:
        """Which layout of states this build has, seen by saving one, and that it uses one that was made here.

        Raises:
            ConfigError: It is none that this program writes, or restoring does nothing.
        """
        tokens = [token for token in range(100, 200) if token != self.backbone.eos_id][:16]
        slot = {"id_slot": 0, "n_predict": 1, "temperature": 0, "cache_prompt": True}
        ask, file, cached, reason = self._child.ask, folder / "probe.bin", 0, "they are not used"
        ask("/completion", {"prompt": tokens, **slot})
        ask("/slots/0?action=save", {"filename": file.name})
        other = tokens[::-1]
        version, content = probe_file(file.read_bytes(), self.backbone.geometry["decoder"], other)
        file.write_bytes(content)
        try:
            ask("/slots/0?action=restore", {"filename": file.name})
            cached = int(ask("/completion", {"prompt": [*other, tokens[0]], **slot})["timings"]["cache_n"])
        except RequestError as error:
            reason = error.message
        if cached < len(tokens):
            raise ConfigError(
                f"this build of llama.cpp does not take saved states: {reason}.",
                hint="install another version of xllamacpp, or use the engine torch.",
            )
        return version

    def _watch(self) -> None:
        """End texts whose deadline has passed; start the child again, once, if it dies."""
        while not self.failed:
            with self._changed:
                if self._changed.wait_for(lambda: self._closing, _PATIENCE):
                    return
                now = time.monotonic()
                late = [text for texts in self._texts.values() for text in texts if text.deadline <= now]
            self._interrupt(late, "timeout")
            if not self._child.alive:
                self._restart()

    def _restart(self) -> None:
        """Start the child once more; nothing is submitted meanwhile, and what runs or waits fails."""
        _log.error("llama.cpp's server has ended.")
        self._child.close()
        try:
            if self.restarts:
                raise BackboneError("llama.cpp's server has ended twice.", hint="start the server again.")
            self.restarts += 1
            child = self._start()
        except Exception as error:
            _log.error("%s", error)
            self.failed = True
            self.on_failure()
            return
        with self._changed:
            for slot in self._slots:
                slot.state = None
            self._child = child
            if self._closing:
                child.close()


def _ignore(output: SequenceOutput) -> None:
    """What becomes of the outputs after a callback failed."""


def _options(text: _Text) -> dict[str, Any]:
    """What llama.cpp is asked for, besides the prompt."""
    request, sampling = text.request, text.request.sampling
    options: dict[str, Any] = {
        # A bare text must never find a prefix that its first tokens happen to stand for.
        "cache_prompt": request.prefix is not None,
        "stream": True,
        "return_tokens": True,
        "timings_per_token": True,
        "n_predict": sampling.max_new_tokens,
        "samplers": ("temperature", "top_k", "top_p", "min_p"),
        **{name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p")},
        "logit_bias": [*map(list, sampling.logit_bias.items()), *([token, False] for token in sampling.banned)],
    }
    if sampling.seed is not None:
        # Each text's own; the last number of 32 bits stands for none.
        digest = hashlib.sha256(f"{sampling.seed} {text.index}".encode()).digest()
        options["seed"] = int.from_bytes(digest[:8], "little") % (2**32 - 1)
    if sampling.logprobs is not None:
        options["n_probs"] = max(1, sampling.logprobs)
    if request.grammar is not None:
        options["json_schema"] = json.loads(request.grammar.schema)
    return options
