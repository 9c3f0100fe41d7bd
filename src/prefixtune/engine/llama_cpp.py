"""llama.cpp behind the interface of every engine: a slot per text, with the prefix restored into it.

llama.cpp's server runs as a child process. A prefix is a saved state of a slot; in the prompt, P placeholder tokens
stand for it. Every answer's `timings.cache_n` says whether the slot held them: without that, llama.cpp would read the
placeholders as text.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.plain_layers import check_plain_layers
from prefixtune.engine import llama_child
from prefixtune.engine.gguf import find_gguf
from prefixtune.engine.llama_state import SavedState, SavedStates, is_interleaved, probe_file
from prefixtune.engine.remote import RemoteEngine, RemoteSlot, RemoteText
from prefixtune.engine.remote_server import RemoteServer
from prefixtune.engine.request import FinishReason, SequenceOutput, Token
from prefixtune.errors import BackboneError, ConfigError, RequestError
from prefixtune.prefix.prefix import Prefix
from prefixtune.sampling.detokenizer import Detokenizer
from prefixtune.utils.extras import needs_extra
from prefixtune.utils.files import reporting_write_errors, work_folder
from prefixtune.utils.folders import cache_folder
from prefixtune.utils.machine import num_cores

__all__ = ["LlamaCppEngine"]


_COMPLETION = "/completion"
_DEFAULT_LENGTH = 4096
_MOST_SLOTS = 256
"""LLAMA_MAX_SEQ of llama.cpp."""
_SHOWN = 300
"""Characters of what its process wrote before it ended."""
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


class LlamaCppEngine(RemoteEngine):
    """Generates text by llama.cpp, for a decoder-only model whose keys were compared with llama.cpp's.

    Args:
        backbone: The model's tokenizer and shapes, by `load_shapes`; its weights are not used.
        gguf: The model's weights: any quantization of the backbone; empty: the file of an embedded backbone.
        num_slots: Texts that run at once.
        max_length: Most positions of a text, prefix included; 0: the backbone's limit, at most 4,096.
        threads: Of the processor; 0: one per core. Beside another busy program, fewer are faster.

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
        length = min(limit for limit in limits if limit)
        check_plain_layers(backbone, "llama.cpp", length)
        path, quantization = find_gguf(gguf, backbone)
        super().__init__(f"llama.cpp ({quantization or 'unknown quantization'})", backbone, num_slots)
        self.max_length, self.lacks = length, _LACKS
        sizes = {"num_slots": num_slots, "length": length, "threads": threads or num_cores()}
        parent = cache_folder() / "llama.cpp"
        with contextlib.ExitStack() as made:
            with reporting_write_errors(parent):
                parent.mkdir(parents=True, exist_ok=True)
                self._folder = made.enter_context(work_folder(parent, "states"))
            self._options = {"gguf": str(path.absolute()), "states": str(self._folder), **sizes}
            self._states = SavedStates(self._folder, backbone)
            self._run()
            self._made = made.pop_all()

    def close(self, timeout: float = 10.0) -> None:
        """Cancel what still runs, and stop."""
        super().close(timeout)
        self._made.close()

    @property
    def cache_bytes(self) -> int:
        """Memory for keys and values of all running texts, in float16."""
        return 2 * len(self._slots) * self.max_length * sum(shape.size for shape in self.backbone.geometry["decoder"])

    # --- the server ---------------------------------------------------------------------------------------------------

    def _start(self) -> RemoteServer:
        server = _start_child(self._options)
        try:
            self._states.version = self._probe(server)
        except BaseException:
            server.close()
            raise
        return server

    def _probe(self, server: RemoteServer) -> int:
        """Which layout of states this build has, seen by saving one, and that it uses one that was made here.

        Raises:
            ConfigError: It is none that this program writes, or restoring does nothing.
        """
        tokens = [token for token in range(100, 200) if token != self.backbone.eos_id][:16]
        slot = {"id_slot": 0, "n_predict": 1, "temperature": 0, "cache_prompt": True}
        file, other, cached, reason = self._folder / "probe.bin", tokens[::-1], 0, "they are not used"
        server.ask(_COMPLETION, {"prompt": tokens, **slot})
        server.ask("/slots/0?action=save", {"filename": file.name})
        version, content = probe_file(file.read_bytes(), self.backbone.geometry["decoder"], other)
        file.write_bytes(content)
        try:
            server.ask("/slots/0?action=restore", {"filename": file.name})
            answer = server.ask(_COMPLETION, {"prompt": [*other, tokens[0]], **slot})
            cached = int(answer["timings"]["cache_n"])
        except RequestError as error:
            reason = error.message
        if cached < len(tokens):
            raise ConfigError(
                f"this build of llama.cpp does not take saved states: {reason}.",
                hint="install another version of xllamacpp, or use the engine torch.",
            )
        return version

    # --- texts --------------------------------------------------------------------------------------------------------

    def _take(self, prefix: Prefix) -> SavedState:
        return self._states.of(prefix)

    def _release(self, state: SavedState) -> None:
        self._states.release(state)

    def _generate(
        self, server: RemoteServer, slot: RemoteSlot, text: RemoteText, pieces: Detokenizer, ends: set[int]
    ) -> FinishReason:
        request = text.request
        placeholders: list[int] = [] if text.state is None else text.state.placeholders
        if slot.state is not text.state:
            slot.state = None
            if text.state is not None:
                server.ask(f"/slots/{slot.number}?action=restore", {"filename": text.state.path.name})
                slot.state = text.state
        body = {"prompt": [*placeholders, *request.prompt], "id_slot": slot.number, **_options(text)}
        with contextlib.closing(server.stream(_COMPLETION, body, text.opened)) as events:
            for event in events:
                cached = int(event["timings"]["cache_n"])
                if cached < len(placeholders):
                    raise RequestError(
                        f"llama.cpp did not use the prefix: {cached} of {len(placeholders)} positions.",
                        hint="send the request again.",
                    )
                if event["stop"]:
                    return "stop" if event["stop_type"] == "eos" else "length"
                count = int(event["tokens_predicted"]) - text.num_new_tokens
                tokens, is_last = self._tokens_of(event, ends, request.sampling.logprobs, count)
                text.num_new_tokens += count
                words = pieces.add(*(token.id for token in tokens))
                if tokens or words:
                    self._deliver(text, SequenceOutput(request.id, text.index, tokens, words))
                if is_last or pieces.stopped:
                    return "stop"
                if text.ended is not None:
                    break
        return "length"

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


def _start_child(options: Mapping[str, Any]) -> RemoteServer:
    """Start llama.cpp's server, and wait until it has loaded the model.

    Args:
        options: Of `llama_child.serve`, without the token.

    Raises:
        BackboneError: It ends before.
    """
    token = secrets.token_urlsafe()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-P", llama_child.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            # The terminal's signals are for the parent, which ends running texts first.
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError):
            # Through a pipe: everybody on a machine sees arguments.
            print(json.dumps({**options, "token": token}), file=process.stdin, flush=True)
        with process.stdout as out:
            address = out.readline().strip()
        server = RemoteServer("llama.cpp", address, token, process)
        if not address:
            server.close()
            log.seek(0)
            said = " ".join(log.read().decode(errors="replace").split())
            raise BackboneError(
                f"llama.cpp cannot serve {options['gguf']!r}: {said[-_SHOWN:] or 'it does not say why'}",
                hint="check that it is a whole GGUF file of a model; if memory is short, lower --num-slots or "
                "--max-length.",
            )
    return server


def _options(text: RemoteText) -> dict[str, Any]:
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
    if text.seed is not None:
        options["seed"] = text.seed
    if sampling.logprobs is not None:
        options["n_probs"] = max(1, sampling.logprobs)
    if request.grammar is not None:
        options["json_schema"] = json.loads(request.grammar.schema)
    return options
