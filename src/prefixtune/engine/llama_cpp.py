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
import socket
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.plain_layers import check_plain_layers
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.engine.base import Receive, Snapshot
from prefixtune.engine.llama_child import LlamaChild, Refused
from prefixtune.engine.llama_state import check_layout, encode_file, is_interleaved, placeholders_for, rows_of
from prefixtune.engine.request import (
    ContextLengthError,
    EngineFull,
    FinishReason,
    Request,
    SequenceOutput,
    Token,
)
from prefixtune.engine.sequence import RunningSequence
from prefixtune.errors import BackboneError, ConfigError, RequestError
from prefixtune.prefix.prefix import Prefix
from prefixtune.sampling.detokenizer import Detokenizer
from prefixtune.utils.extras import needs_extra
from prefixtune.utils.files import reporting_write_errors, work_folder
from prefixtune.utils.folders import cache_folder
from prefixtune.utils.machine import num_cores

__all__ = ["LlamaCppConfig", "LlamaCppEngine"]


_log = logging.getLogger(__name__)
_DEFAULT_LENGTH = 4096
_MOST_SLOTS = 256
"""LLAMA_MAX_SEQ of llama.cpp."""
_CONTEXT_TOKENS = 4
"""Tokens of a prompt with which the first generated tokens are decoded."""
_STATE_BYTES = 2**30
"""Of saved states; beyond them, those that were not used for longest are removed."""
_PATIENCE = 0.2
"""Seconds between looks at deadlines and at the child process."""
_SAMPLERS = ("temperature", "top_k", "top_p", "min_p")
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


@dataclass(frozen=True)
class LlamaCppConfig:
    """How llama.cpp runs.

    Attributes:
        num_slots: Texts that run at once.
        max_length: Most positions of a text, prefix included; 0: the backbone's limit, at most 4,096.
        threads: Of the processor; 0: one per core. Beside another busy program, fewer are faster.
        max_waiting: Texts that may wait for a slot.
    """

    num_slots: int = 8
    max_length: int = 0
    threads: int = 0
    max_waiting: int = 10_000


class _State(NamedTuple):
    """A prefix as llama.cpp takes it: a file in the folder of states, and what stands for it in a prompt."""

    prefix: Prefix
    path: Path
    placeholders: list[int]

    @property
    def num_bytes(self) -> int:
        """Of the file, nearly."""
        return 2 * self.prefix.num_parameters


@dataclass(eq=False)
class _Text:
    """One text of a request."""

    request: Request
    index: int
    receive: Receive
    deadline: float
    state: _State | None
    slot: int = -1
    num_new_tokens: int = 0
    ended: FinishReason | None = None
    connection: socket.socket | None = None

    def interrupt(self, reason: FinishReason) -> None:
        """End it early, from any thread."""
        self.ended = self.ended or reason
        if (connection := self.connection) is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def opened(self, connection: socket.socket) -> None:
        """It can be interrupted by this connection."""
        self.connection = connection
        if self.ended is not None:
            raise InterruptedError("it was interrupted")


@dataclass(eq=False)
class _Slot:
    """A slot of llama.cpp's server, and the prefix whose state it holds."""

    number: int
    state: _State | None = None
    used: float = 0.0
    text: _Text | None = None
    wake: threading.Event = field(default_factory=threading.Event)


class LlamaCppEngine:
    """Generates text by llama.cpp, for a decoder-only model whose keys were compared with llama.cpp's.

    Args:
        backbone: The model's tokenizer and shapes; its weights are not used.
        gguf: The model's weights: any quantization of the backbone.
        config: How it runs.

    Attributes:
        backbone: See there.
        lacks: See `base.Engine`.
        max_length: Most positions of a text.
        failed: llama.cpp's server has ended and could not be started again.
        on_failure: Called then.

    Raises:
        BackboneError: llama.cpp cannot load the file, or cannot use prefixes of this model type.
        ConfigError: `xllamacpp` is missing, this build does not restore states, there are too many slots, or the cache
            folder cannot be written.
    """

    def __init__(self, backbone: Backbone, gguf: str | Path, config: LlamaCppConfig | None = None) -> None:
        with needs_extra("llama", "the engine llama.cpp"):
            import xllamacpp  # noqa: F401
        is_interleaved(backbone)
        self.backbone, self.gguf, self.config = backbone, Path(gguf), config or LlamaCppConfig()
        if not 1 <= self.config.num_slots <= _MOST_SLOTS:
            raise ConfigError(
                f"num_slots is {self.config.num_slots}, but llama.cpp has 1 to {_MOST_SLOTS}.", hint="ask for fewer."
            )
        limits = (self.config.max_length or _DEFAULT_LENGTH, backbone.max_positions)
        self.max_length = min(limit for limit in limits if limit)
        check_plain_layers(backbone, "llama.cpp", self.max_length)
        self.lacks: Mapping[str, Any] = _LACKS
        self.restarts = 0
        # Saved states, the last used one at the end; the prefix is kept, so that its id stays its own.
        self._states: OrderedDict[int, _State] = OrderedDict()
        self._states_lock = threading.Lock()
        self._numbers = itertools.count()
        self._slots = [_Slot(number) for number in range(self.config.num_slots)]
        self._waiting: dict[str, deque[_Text]] = {}
        self._texts: dict[str, list[_Text]] = {}
        self.on_failure: Callable[[], None] = lambda: None
        self.failed = self._closing = False
        self._tokens = 0
        # Nothing slow happens while it is held, and no callback is called.
        self._changed = threading.Condition(threading.RLock())
        with contextlib.ExitStack() as made:
            self._folder = made.enter_context(_states_folder())
            self._child = self._start()
            made.callback(lambda: self._child.close())
            self._version = self._probe()
            self._made = made.pop_all()
        self._threads = [threading.Thread(target=self._watch, name="prefixtune-llama", daemon=True)]
        self._threads += [threading.Thread(target=self._serve, args=(slot,), daemon=True) for slot in self._slots]
        for thread in self._threads:
            thread.start()

    def _start(self) -> LlamaChild:
        threads = self.config.threads or num_cores()
        return LlamaChild(self.gguf, self.config.num_slots, self.max_length, threads, self._folder)

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
        sizes = (layer.num_kv_heads * (layer.key_dim + layer.value_dim) for layer in self.backbone.geometry["decoder"])
        return 2 * self.config.num_slots * self.max_length * sum(sizes)

    @property
    def num_unfinished(self) -> int:
        """Requests that have not ended."""
        return len(self._texts)

    def submit(self, request: Request, receive: Receive, deadline: float | None = None) -> None:
        """As `Engine.submit`.

        Raises:
            EngineFull: Too many texts wait, or the engine is closing or has failed.
            RequestError: It asks for something that llama.cpp does not have, or its id is in use.
            ContextLengthError: It needs more positions than a slot has.
            BackboneError: Its prefix does not fit the backbone, or was trained for other weights.
            ConfigError: Its prefix has numbers that llama.cpp cannot hold.
            PrefixError: The disk is full.
        """
        self._check(request)
        state = None if request.prefix is None else self._state(request.prefix)
        end = float("inf") if deadline is None else time.monotonic() + deadline
        with self._changed:
            if not self.healthy:
                raise EngineFull("llama.cpp is not running.", hint="try again later.")
            if request.id in self._texts:
                raise RequestError(f"a request {request.id!r} is running already.", hint="give each its own id.")
            if self._num_waiting + request.n > self.config.max_waiting:
                raise EngineFull(f"{self._num_waiting:,} texts wait for a slot already.", hint="try again later.")
            texts = [_Text(request, index, receive, end, state) for index in range(request.n)]
            self._texts[request.id] = list(texts)
            self._waiting.setdefault(request.tenant, deque()).extend(texts)
            self._assign()

    def _check(self, request: Request) -> None:
        sampling = request.sampling
        for name, nothing in self.lacks.items():
            if getattr(sampling, name) != nothing:
                raise RequestError(
                    f"the engine llama.cpp has no {name}.", hint="leave it out, or serve with the engine torch."
                )
        if request.prefix is not None:
            load_prefix(request.prefix, self.backbone)
        self.check_length(len(request.prompt), request.prefix_length, sampling.max_new_tokens)
        tokens = (*request.prompt, *sampling.banned, *sampling.logit_bias)
        unknown = [token for token in tokens if not 0 <= token < self.vocab_size]
        if unknown:
            raise RequestError(
                f"there is no token {unknown[0]}.", hint="encode the text with the backbone's tokenizer."
            )

    def available_tokens(self, prompt_tokens: int, prefix_length: int) -> int:
        """Most tokens that can be generated after a prompt; 0 or less: the prompt itself is too long."""
        # The last token takes no position.
        return self.max_length - prefix_length - prompt_tokens + 1

    def check_length(self, prompt_tokens: int, prefix_length: int, new_tokens: int) -> None:
        """Refuse a request that needs more positions than a slot has.

        Raises:
            ContextLengthError: It does.
        """
        if max(1, new_tokens) > self.available_tokens(prompt_tokens, prefix_length):
            raise ContextLengthError(
                f"the request needs {prefix_length} (prefix) + {prompt_tokens} (text) + {new_tokens} (new) positions, "
                f"but the limit is {self.max_length}.",
                hint="shorten the text or lower max_new_tokens.",
            )

    def cancel(self, request_id: str) -> None:
        """Cancel a request; its texts end with `cancelled`. Unknown ids are ignored."""
        with self._changed:
            texts = list(self._texts.get(request_id, ()))
        self._interrupt(texts, "cancelled")

    def snapshot(self) -> Snapshot:
        """What the engine is doing now, and its counters."""
        with self._changed:
            running = [
                RunningSequence(text.slot, one.id, one.tenant, one.prefix_name, len(one.prompt), text.num_new_tokens)
                for slot in self._slots
                if (text := slot.text) is not None
                for one in [text.request]
            ]
            return Snapshot(tuple(running), self._num_waiting, steps=0, texts=0, tokens=self._tokens)

    def close(self, timeout: float = 10.0) -> None:
        """Cancel what still runs, and stop."""
        with self._changed:
            self._closing = True
            texts = list(itertools.chain.from_iterable(self._texts.values()))
            for slot in self._slots:
                slot.wake.set()
            self._changed.notify_all()
        self._interrupt(texts, "cancelled")
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout / len(self._threads))
        self._made.close()

    def __enter__(self) -> LlamaCppEngine:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    # --- which text runs where ----------------------------------------------------------------------------------------

    @property
    def _num_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    def _assign(self) -> None:
        """Give free slots to waiting texts, one tenant after the other; the lock is held."""
        while self._waiting and (free := [slot for slot in self._slots if slot.text is None]):
            tenant = next(iter(self._waiting))
            texts = self._waiting.pop(tenant)
            text = texts.popleft()
            if texts:
                # Behind the other tenants.
                self._waiting[tenant] = texts
            wanted = text.state
            slot = min(free, key=lambda slot: (wanted is None or slot.state is not wanted, slot.used))
            slot.text, text.slot = text, slot.number
            slot.wake.set()

    def _interrupt(self, texts: Iterable[_Text], reason: FinishReason) -> None:
        """End texts early."""
        ended = []
        with self._changed:
            for text in texts:
                queue = self._waiting.get(text.request.tenant)
                if queue is not None and text in queue:
                    queue.remove(text)
                    if not queue:
                        del self._waiting[text.request.tenant]
                    ended.append(text)
                else:
                    text.interrupt(reason)
        for text in ended:
            self._end(text, reason)

    def _end(self, text: _Text, reason: FinishReason, words: str = "", **details: Any) -> None:
        """Tell the caller that a text has ended; the lock is not held."""
        with self._changed:
            texts = self._texts.get(text.request.id, [])
            if text not in texts:
                return
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
                texts = list(self._texts.get(text.request.id, ()))
            for one in (text, *texts):
                one.receive = _ignore
            self._interrupt(texts, "cancelled")

    # --- a slot's thread ----------------------------------------------------------------------------------------------

    def _serve(self, slot: _Slot) -> None:
        while True:
            slot.wake.wait()
            slot.wake.clear()
            if self._closing and slot.text is None:
                return
            if (text := slot.text) is None:
                continue
            child = self._child
            try:
                self._run(child, slot, text)
            except Exception as error:
                slot.state = None
                if text.ended is not None:
                    self._end(text, text.ended)
                else:
                    crashed = isinstance(error, OSError | http.client.HTTPException) and child.is_dying()
                    refused = isinstance(error, Refused) and text.request.grammar is not None
                    if not isinstance(error, RequestError | OSError | http.client.HTTPException):
                        _log.exception("request %s failed", text.request.id)
                    reason = str(error) or type(error).__name__
                    self._end(text, "error", error=reason, engine_crashed=crashed, refused=refused)
            with self._changed:
                slot.text, slot.used, text.connection = None, time.monotonic(), None
                self._assign()
                if self._closing and slot.text is None:
                    return

    def _run(self, child: LlamaChild, slot: _Slot, text: _Text) -> None:
        """Generate a text in a slot."""
        request, placeholders = text.request, []
        if text.ended is not None or not request.sampling.max_new_tokens:
            self._end(text, text.ended or "length")
            return
        if text.state is None:
            slot.state = None
        else:
            placeholders = text.state.placeholders
            if slot.state is not text.state:
                slot.state = None
                self._restore(child, slot.number, text.state)
                slot.state = text.state
        sampling = request.sampling
        pieces = Detokenizer(
            self.backbone.decode, sampling.stop, verbatim=request.verbatim, context=request.prompt[-_CONTEXT_TOKENS:]
        )
        reason: FinishReason = "length"
        ends = {self.backbone.eos_id, *sampling.end_ids}
        body = self._body(text, [*placeholders, *request.prompt])
        with contextlib.closing(child.stream(body, text.opened)) as events:
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
        self._end(text, text.ended or reason, pieces.finish())

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

    def _body(self, text: _Text, prompt: list[int]) -> dict[str, Any]:
        """What llama.cpp is asked for."""
        request, sampling = text.request, text.request.sampling
        biases = [[token, bias] for token, bias in sampling.logit_bias.items()]
        biases += [[token, False] for token in sampling.banned]
        seed = {} if sampling.seed is None else {"seed": _seed(sampling.seed, text.index)}
        logprobs = {} if sampling.logprobs is None else {"n_probs": max(1, sampling.logprobs)}
        grammar = {} if request.grammar is None else {"json_schema": json.loads(request.grammar.schema)}
        return {
            "prompt": prompt,
            "id_slot": text.slot,
            # A bare text must never find a prefix that its first tokens happen to stand for.
            "cache_prompt": request.prefix is not None,
            "stream": True,
            "return_tokens": True,
            "timings_per_token": True,
            "n_predict": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "samplers": _SAMPLERS,
            "logit_bias": biases,
            **seed,
            **logprobs,
            **grammar,
        }

    # --- prefixes -----------------------------------------------------------------------------------------------------

    def _state(self, prefix: Prefix) -> _State:
        """The saved state of a prefix, written if there is none."""
        with self._states_lock:
            state = self._states.get(id(prefix))
            if state is None:
                path = self._folder / f"{next(self._numbers)}.bin"
                state = _State(prefix, path, placeholders_for(prefix, self.backbone))
                self._write(state)
                self._states[id(prefix)] = state
                self._drop_states()
            self._states.move_to_end(id(prefix))
            return state

    def _write(self, state: _State) -> None:
        content = encode_file(rows_of(state.prefix, self.backbone), state.placeholders, version=self._version)
        with reporting_write_errors(state.path):
            state.path.write_bytes(content)

    def _drop_states(self) -> None:
        """Remove the oldest states beyond the limit, but those that a slot holds and the last one."""
        held = {id(slot.state) for slot in self._slots}
        total = sum(state.num_bytes for state in self._states.values())
        for key, state in list(self._states.items())[:-1]:
            if total <= _STATE_BYTES:
                return
            if id(state) not in held:
                del self._states[key]
                state.path.unlink(missing_ok=True)
                total -= state.num_bytes

    def _restore(self, child: LlamaChild, slot: int, state: _State) -> None:
        """Put a prefix into a slot; its file is written again if it was removed meanwhile."""
        action = f"/slots/{slot}?action=restore"
        try:
            child.ask(action, {"filename": state.path.name})
        except Refused:
            self._write(state)
            child.ask(action, {"filename": state.path.name})

    def _probe(self) -> int:
        """Which layout of states this build has, seen by saving one and restoring it.

        Raises:
            ConfigError: It is none that this program writes, or restoring does nothing.
        """
        tokens = [token for token in range(100, 200) if token != self.backbone.eos_id][:16]
        greedy = {"prompt": tokens, "id_slot": 0, "n_predict": 1, "temperature": 0, "cache_prompt": True}
        file, ask = "probe.bin", self._child.ask
        ask("/completion", greedy)
        ask("/slots/0?action=save", {"filename": file})
        version = check_layout((self._folder / file).read_bytes(), self.backbone.geometry["decoder"])
        other = min(1, self.config.num_slots - 1)
        ask("/completion", {**greedy, "prompt": tokens[::-1], "id_slot": other, "cache_prompt": False})
        ask(f"/slots/{other}?action=restore", {"filename": file})
        answer = ask("/completion", {**greedy, "prompt": [*tokens, tokens[0]], "id_slot": other})
        if int(answer["timings"]["cache_n"]) < len(tokens):
            raise ConfigError(
                "this build of llama.cpp does not use the states that it restores.",
                hint="install another version of xllamacpp, or use the engine torch.",
            )
        return version

    # --- watching -----------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """End texts whose deadline has passed; start the child again, once, if it dies."""
        while True:
            with self._changed:
                if self._closing:
                    return
                self._changed.wait(_PATIENCE)
                now = time.monotonic()
                late = [text for texts in self._texts.values() for text in texts if text.deadline <= now]
            self._interrupt(late, "timeout")
            if not self._child.alive and not self.failed and not self._closing:
                self._restart()

    def _restart(self) -> None:
        """End what waits, and start the child once more; nothing is submitted meanwhile, as it is not healthy."""
        _log.error("llama.cpp's server has ended.")
        with self._changed:
            waiting = list(itertools.chain.from_iterable(self._waiting.values()))
            self._waiting.clear()
        for text in waiting:
            self._end(text, "error", error="llama.cpp's server has ended.", engine_crashed=True)
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
    """What a failed callback gets."""


def _seed(seed: int, index: int) -> int:
    """A text's seed for llama.cpp, which takes the last number of 32 bits for none."""
    digest = hashlib.sha256(f"{seed} {index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") % (2**32 - 1)


@contextlib.contextmanager
def _states_folder() -> Iterator[Path]:
    """A folder of saved states for one engine; those of processes that were killed are removed.

    Raises:
        ConfigError: The cache folder cannot be written.
    """
    parent = cache_folder() / "llama.cpp"
    with contextlib.ExitStack() as made:
        try:
            parent.mkdir(parents=True, exist_ok=True)
            folder = made.enter_context(work_folder(parent, "states"))
        except OSError as error:
            raise ConfigError(
                f"cannot write to {str(parent)!r}: {error.strerror or error}.", hint="set PREFIXTUNE_HOME."
            ) from error
        yield folder
