"""llama.cpp behind the interface of every engine: a slot per text, with the prefix restored into it.

llama.cpp's server runs as a child process. A prefix is a saved state of a slot; in the prompt, P placeholder tokens
stand for it. Every answer's `timings.cache_n` says whether the slot held them: without that, llama.cpp would read the
placeholders as text.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from prefixtune.backbone.backbone import Backbone
from prefixtune.engine.base import Receive, Snapshot
from prefixtune.engine.llama_state import check_layout, encode_file, placeholders_for, rows_of
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
from prefixtune.utils.files import atomic_path
from prefixtune.utils.folders import cache_folder

__all__ = ["LlamaCppConfig", "LlamaCppEngine"]


_log = logging.getLogger(__name__)
_DEFAULT_LENGTH = 4096
_SECONDS = 600
"""Until llama.cpp's server has answered, or written its next token."""
_CONTEXT_TOKENS = 4
"""Tokens of a prompt with which the first generated tokens are decoded."""
_MOST_STATES = 64
"""Prefixes whose state is known without looking."""
_CACHE_BYTES = 2**30
"""Of saved states in the cache folder; the oldest beyond them are removed at start."""
_PATIENCE = 0.2
"""Seconds between looks at deadlines and at the child process."""
_SAMPLERS = ("temperature", "top_k", "top_p", "min_p")
_REFUSED = {
    "min_new_tokens": 0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "prompt_logprobs": None,
}
"""Sampling parameters that llama.cpp lacks, or counts over the placeholders too -> the values that ask for nothing."""


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

    file: str
    placeholders: list[int]


@dataclass(eq=False)
class _Text:
    """One text of a request."""

    request: Request
    index: int
    receive: Receive
    deadline: float
    slot: int = -1
    num_new_tokens: int = 0
    ended: FinishReason | None = None
    connection: http.client.HTTPConnection | None = None

    def interrupt(self, reason: FinishReason) -> None:
        """End it early, from any thread."""
        self.ended = self.ended or reason
        if self.connection is not None and self.connection.sock is not None:
            with contextlib.suppress(OSError):
                self.connection.sock.shutdown(2)


@dataclass(eq=False)
class _Slot:
    """A slot of llama.cpp's server, and the prefix whose state it holds."""

    number: int
    state: str = ""
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
        max_length: Most positions of a text.
        failed: llama.cpp's server has ended and could not be started again.
        on_failure: Called then.

    Raises:
        BackboneError: llama.cpp cannot load the file, or cannot use prefixes of this model type.
        ConfigError: `xllamacpp` is missing, or this build does not restore states.
    """

    def __init__(self, backbone: Backbone, gguf: str | Path, config: LlamaCppConfig | None = None) -> None:
        with needs_extra("llama", "the engine llama.cpp"):
            import xllamacpp
        self.backbone, self.gguf, self.config = backbone, Path(gguf), config or LlamaCppConfig()
        limits = (self.config.max_length or _DEFAULT_LENGTH, backbone.max_positions)
        self.max_length = min(limit for limit in limits if limit)
        self.restarts = 0
        self._folder = _states_folder(str(xllamacpp.__version__))
        self._states: OrderedDict[int, tuple[Prefix, _State]] = OrderedDict()
        self._slots = [_Slot(number) for number in range(self.config.num_slots)]
        self._waiting: dict[str, deque[_Text]] = {}
        self._texts: dict[str, list[_Text]] = {}
        self.on_failure: Callable[[], None] = lambda: None
        self.failed = self._closing = False
        self._tokens = 0
        self._changed = threading.Condition(threading.RLock())
        self._child, self._address = self._start()
        self._version = self._probe()
        self._threads = [threading.Thread(target=self._watch, name="prefixtune-llama", daemon=True)]
        self._threads += [threading.Thread(target=self._serve, args=(slot,), daemon=True) for slot in self._slots]
        for thread in self._threads:
            thread.start()

    # --- for callers --------------------------------------------------------------------------------------------------

    @property
    def healthy(self) -> bool:
        """Whether requests are computed."""
        return not self.failed and not self._closing and self._child.poll() is None

    @property
    def vocab_size(self) -> int:
        """Tokens that the model can read."""
        return self.backbone.vocab_size

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
        """
        self._check(request)
        end = float("inf") if deadline is None else time.monotonic() + deadline
        with self._changed:
            if not self.healthy:
                raise EngineFull("llama.cpp is not running.", hint="try again later.")
            if request.id in self._texts:
                raise RequestError(f"a request {request.id!r} is running already.", hint="give each its own id.")
            if self._num_waiting + request.n > self.config.max_waiting:
                raise EngineFull(f"{self._num_waiting:,} texts wait for a slot already.", hint="try again later.")
            texts = [_Text(request, index, receive, end) for index in range(request.n)]
            self._texts[request.id] = list(texts)
            self._waiting.setdefault(request.tenant, deque()).extend(texts)
            self._assign()

    def _check(self, request: Request) -> None:
        sampling = request.sampling
        for name, nothing in _REFUSED.items():
            if getattr(sampling, name) != nothing:
                raise RequestError(
                    f"the engine llama.cpp has no {name}.", hint="leave it out, or serve with the engine torch."
                )
        self.check_length(len(request.prompt), request.prefix_length, sampling.max_new_tokens)
        unknown = [token for token in request.prompt if not 0 <= token < self.backbone.vocab_size]
        if unknown:
            raise RequestError(
                f"there is no token {unknown[0]}.", hint="encode the text with the backbone's tokenizer."
            )

    def available_tokens(self, prompt_tokens: int, prefix_length: int) -> int:
        """Most tokens that can be generated after a prompt; 0 or less: the prompt itself is too long."""
        return self.max_length - prefix_length - prompt_tokens

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
            for text in list(self._texts.get(request_id, ())):
                self._interrupt(text, "cancelled")

    def snapshot(self) -> Snapshot:
        """What the engine is doing now, and its counters."""
        with self._changed:
            running = [text for slot in self._slots if (text := slot.text) is not None]
            return Snapshot(
                running=tuple(
                    RunningSequence(
                        text.slot,
                        text.request.id,
                        text.request.tenant,
                        text.request.prefix_name,
                        len(text.request.prompt),
                        text.num_new_tokens,
                    )
                    for text in running
                ),
                waiting=self._num_waiting,
                steps=0,
                texts=0,
                tokens=self._tokens,
            )

    def close(self, timeout: float = 10.0) -> None:
        """Cancel what still runs, and stop."""
        with self._changed:
            self._closing = True
            for texts in list(self._texts.values()):
                for text in list(texts):
                    self._interrupt(text, "cancelled")
            for slot in self._slots:
                slot.wake.set()
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout / len(self._threads))
        self._stop_child()

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
            wanted = self._state(text.request.prefix).file if text.request.prefix is not None else ""
            slot = min(free, key=lambda slot: (slot.state != wanted or not wanted, slot.used))
            slot.text, text.slot = text, slot.number
            slot.wake.set()

    def _interrupt(self, text: _Text, reason: FinishReason) -> None:
        """End a text early; the lock is held."""
        queue = self._waiting.get(text.request.tenant)
        if text.slot < 0 and queue is not None and text in queue:
            queue.remove(text)
            if not queue:
                del self._waiting[text.request.tenant]
            self._end(text, reason)
        else:
            text.interrupt(reason)

    def _end(self, text: _Text, reason: FinishReason, words: str = "", error: str = "", crashed: bool = False) -> None:
        """Tell the caller that a text has ended."""
        with self._changed:
            texts = self._texts.get(text.request.id, [])
            if text not in texts:
                return
            texts.remove(text)
            if not texts:
                del self._texts[text.request.id]
            self._changed.notify_all()
        output = SequenceOutput(text.request.id, text.index, (), words, reason, error, engine_crashed=crashed)
        self._deliver(text, output)

    def _deliver(self, text: _Text, output: SequenceOutput) -> None:
        try:
            text.receive(output)
        except Exception:
            _log.exception("the callback of request %s failed; the request is cancelled.", text.request.id)
            text.ended = text.ended or "cancelled"

    # --- a slot's thread ----------------------------------------------------------------------------------------------

    def _serve(self, slot: _Slot) -> None:
        while True:
            slot.wake.wait()
            slot.wake.clear()
            if self._closing and slot.text is None:
                return
            if (text := slot.text) is None:
                continue
            try:
                self._run(slot, text)
            except (OSError, http.client.HTTPException, ValueError, KeyError, RequestError, ConfigError) as error:
                slot.state = ""
                if text.ended is not None:
                    self._end(text, text.ended)
                else:
                    crashed = self._child.poll() is not None
                    self._end(text, "error", error=str(error) or type(error).__name__, crashed=crashed)
            with self._changed:
                slot.text, slot.used, text.connection = None, time.monotonic(), None
                self._assign()
                if self._closing and slot.text is None:
                    return

    def _run(self, slot: _Slot, text: _Text) -> None:
        """Generate a text in a slot."""
        request, placeholders = text.request, []
        if text.ended is not None:
            self._end(text, text.ended)
            return
        if request.prefix is None:
            slot.state = ""
        else:
            state = self._state(request.prefix)
            placeholders = state.placeholders
            if slot.state != state.file:
                slot.state = ""
                self._restore(slot.number, state)
                slot.state = state.file
        sampling = request.sampling
        pieces = Detokenizer(
            self.backbone.decode, sampling.stop, verbatim=request.verbatim, context=request.prompt[-_CONTEXT_TOKENS:]
        )
        reason: FinishReason = "length"
        ends = {self.backbone.eos_id, *sampling.end_ids}
        body = self._body(text, [*placeholders, *request.prompt])
        with contextlib.closing(self._stream(text, body)) as events:
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
                tokens = self._tokens_of(event, ends)
                text.num_new_tokens += len(tokens)
                self._tokens += len(tokens)
                words = pieces.add(*(token.id for token in tokens))
                ended = pieces.stopped or len(tokens) < len(event["tokens"])
                if tokens or words:
                    self._deliver(text, SequenceOutput(request.id, text.index, tokens, words))
                if ended:
                    reason = "stop"
                    break
                if text.ended is not None:
                    break
        self._end(text, text.ended or reason, pieces.finish())

    def _tokens_of(self, event: Mapping[str, Any], ends: set[int]) -> tuple[Token, ...]:
        """An event's tokens, up to one that ends the text."""
        found = {}
        for entry in event.get("completion_probabilities", ()):
            best = tuple((int(top["id"]), float(top["logprob"])) for top in entry["top_logprobs"])
            found[int(entry["id"])] = Token(int(entry["id"]), float(entry["logprob"]), best)
        tokens = []
        for token in event["tokens"]:
            if token in ends:
                break
            tokens.append(found.get(token, Token(token)))
        return tuple(tokens)

    def _body(self, text: _Text, prompt: list[int]) -> dict[str, Any]:
        """What llama.cpp is asked for."""
        request, sampling = text.request, text.request.sampling
        biases = [[token, bias] for token, bias in sampling.logit_bias.items()]
        biases += [[token, False] for token in sampling.banned]
        seed = {} if sampling.seed is None else {"seed": (sampling.seed + text.index) % 2**32}
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

    # --- talking to the child -----------------------------------------------------------------------------------------

    def _start(self) -> tuple[subprocess.Popen[str], tuple[str, int]]:
        """Start llama.cpp's server, and wait until it has loaded the model.

        Raises:
            BackboneError: It ends before.
        """
        threads = self.config.threads or len(os.sched_getaffinity(0))
        options = {
            "gguf": str(self.gguf),
            "num_slots": self.config.num_slots,
            "length": self.max_length,
            "states": str(self._folder),
            "threads": threads,
        }
        child = subprocess.Popen(
            [sys.executable, "-m", "prefixtune.engine.llama_server", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert child.stdout is not None
        with child.stdout:
            address = child.stdout.readline().strip()
        if not address:
            child.kill()
            child.wait()
            raise BackboneError(
                f"llama.cpp cannot load {str(self.gguf)!r}.", hint="check that it is a whole GGUF file of a model."
            )
        host, _, port = address.removeprefix("http://").rpartition(":")
        return child, (host, int(port))

    def _stop_child(self) -> None:
        with contextlib.suppress(OSError):
            if self._child.stdin is not None:
                self._child.stdin.close()
        try:
            self._child.wait(5)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    @contextlib.contextmanager
    def _post(
        self, path: str, body: Mapping[str, Any], text: _Text | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """Ask llama.cpp's server; its answer can be read while the block runs.

        Raises:
            RequestError: It refuses.
            OSError: It cannot be reached, or the text was interrupted.
        """
        with contextlib.closing(http.client.HTTPConnection(*self._address, timeout=_SECONDS)) as connection:
            if text is not None:
                text.connection = connection
                if text.ended is not None:
                    raise InterruptedError("it was interrupted")
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            with connection.getresponse() as response:
                if response.status != http.HTTPStatus.OK:
                    raise RequestError(f"llama.cpp refuses it: {_message(response.read(2**16))}.", hint="see why.")
                yield response

    def _ask(self, path: str, body: Mapping[str, Any]) -> Any:
        with self._post(path, body) as response:
            return json.loads(response.read())

    def _stream(self, text: _Text, body: Mapping[str, Any]) -> Generator[Mapping[str, Any]]:
        """The events of a completion."""
        with self._post("/completion", body, text) as response:
            for line in response:
                if line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise RequestError(f"llama.cpp: {event['error'].get('message')}", hint="see its message.")
                    yield event

    def _restore(self, slot: int, state: _State) -> None:
        self._ask(f"/slots/{slot}?action=restore", {"filename": state.file})

    # --- prefixes -----------------------------------------------------------------------------------------------------

    def _state(self, prefix: Prefix) -> _State:
        """The saved state of a prefix, written if the cache folder has none."""
        with self._changed:
            known = self._states.get(id(prefix))
            if known is None:
                known = prefix, self._write_state(prefix)
                self._states[id(prefix)] = known
                if len(self._states) > _MOST_STATES:
                    self._states.popitem(last=False)
            self._states.move_to_end(id(prefix))
            return known[1]

    def _write_state(self, prefix: Prefix) -> _State:
        placeholders = placeholders_for(prefix, self.backbone)
        content = encode_file(rows_of(prefix, self.backbone), placeholders, version=self._version)
        file = f"{hashlib.sha256(content).hexdigest()[:32]}.bin"
        if not (self._folder / file).is_file():
            with atomic_path(self._folder / file) as temporary:
                temporary.write_bytes(content)
        return _State(file, placeholders)

    def _probe(self) -> int:
        """Which layout of states this build has, seen by saving one and restoring it.

        Raises:
            ConfigError: It is none that this program writes, or restoring does nothing.
        """
        tokens = [token for token in range(100, 200) if token != self.backbone.eos_id][:16]
        greedy = {"prompt": tokens, "id_slot": 0, "n_predict": 1, "temperature": 0, "cache_prompt": True}
        file = "probe.bin"
        try:
            self._ask("/completion", greedy)
            self._ask("/slots/0?action=save", {"filename": file})
            version = check_layout((self._folder / file).read_bytes(), self.backbone.geometry["decoder"])
            other = min(1, self.config.num_slots - 1)
            self._ask("/completion", {**greedy, "prompt": tokens[::-1], "id_slot": other, "cache_prompt": False})
            self._ask(f"/slots/{other}?action=restore", {"filename": file})
            answer = self._ask("/completion", {**greedy, "prompt": [*tokens, tokens[0]], "id_slot": other})
            if int(answer["timings"]["cache_n"]) < len(tokens):
                raise ConfigError(
                    "this build of llama.cpp does not use the states that it restores.",
                    hint="install another version of xllamacpp, or use the engine torch.",
                )
        except BaseException:
            self._stop_child()
            raise
        finally:
            (self._folder / file).unlink(missing_ok=True)
        return version

    # --- watching -----------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """End texts whose deadline has passed; start the child again, once, if it dies."""
        while True:
            with self._changed:
                if self._closing:
                    return
                now = time.monotonic()
                for texts in list(self._texts.values()):
                    for text in list(texts):
                        if text.deadline <= now:
                            self._interrupt(text, "timeout")
                if self._child.poll() is not None and not self.failed:
                    self._restart()
                self._changed.wait(_PATIENCE)

    def _restart(self) -> None:
        """End what waits, and start the child once more; the lock is held, so that nothing is submitted meanwhile."""
        _log.error("llama.cpp's server has ended with code %s.", self._child.returncode)
        message = "llama.cpp's server has ended: send the request again."
        waiting, self._waiting = self._waiting, {}
        for texts in waiting.values():
            for text in texts:
                self._end(text, "error", error=message, crashed=True)
        for slot in self._slots:
            slot.state = ""
        self._stop_child()
        try:
            if self.restarts:
                raise BackboneError("llama.cpp's server has ended twice.", hint="start the server again.")
            self.restarts += 1
            self._child, self._address = self._start()
        except BackboneError as error:
            _log.error("%s", error)
            self.failed = True
            self.on_failure()


def _states_folder(version: str) -> Path:
    """The folder of saved states for one build; the oldest files beyond the limit are removed."""
    folder = cache_folder() / "llama.cpp" / version
    folder.mkdir(parents=True, exist_ok=True)
    total = 0
    for path in sorted(folder.glob("*.bin"), key=lambda path: path.stat().st_mtime, reverse=True):
        total += path.stat().st_size
        if total > _CACHE_BYTES:
            path.unlink(missing_ok=True)
    return folder


def _message(content: bytes) -> str:
    """What an error says."""
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return "no reason is given"
