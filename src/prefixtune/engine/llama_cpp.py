"""llama.cpp behind the interface of every engine: a slot per text, with the prefix restored into it.

llama.cpp's server runs as a child process. A prefix is a saved state of a slot; in the prompt, P placeholder tokens
stand for it. Every answer's `timings.cache_n` says whether the slot held them: without that, llama.cpp would read the
placeholders as text.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.shapes import check_plain_layers
from prefixtune.engine import llama_child
from prefixtune.engine.gguf import find_gguf
from prefixtune.engine.llama_state import encode_file, is_interleaved, placeholders_for, rows_of, version_of
from prefixtune.engine.prefix_files import PrefixFile
from prefixtune.engine.remote import PENALTIES, SAMPLERS, PrefixNotUsed, RemoteEngine, RemoteSlot, RemoteText
from prefixtune.engine.remote_server import RemoteServer
from prefixtune.engine.request import FinishReason, Token
from prefixtune.errors import ConfigError, RequestError
from prefixtune.prefix.prefix import Prefix
from prefixtune.utils.extras import needs_extra
from prefixtune.utils.machine import num_cores

_COMPLETION = "/completion"
_DEFAULT_LENGTH = 4096
_MOST_SLOTS = 256
"""LLAMA_MAX_SEQ of llama.cpp."""


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

    # Penalties would count the placeholders, too.
    lacks = ("min_new_tokens", *PENALTIES, "prompt_logprobs")

    def __init__(
        self, backbone: Backbone, gguf: str = "", *, num_slots: int = 8, max_length: int = 0, threads: int = 0
    ) -> None:
        with needs_extra("llama", "the engine llama.cpp"):
            import xllamacpp  # noqa: F401
        is_interleaved(backbone)
        if not 1 <= num_slots <= _MOST_SLOTS:
            raise ConfigError(f"num_slots is {num_slots}, but llama.cpp has 1 to {_MOST_SLOTS}.", hint="ask for fewer.")
        self.max_length = min(filter(None, (max_length or _DEFAULT_LENGTH, backbone.max_positions)))
        check_plain_layers(backbone, "llama.cpp", self.max_length)
        self._path, quantization = find_gguf(gguf, backbone)
        self._threads = threads or num_cores()
        super().__init__(f"llama.cpp ({quantization or 'unknown quantization'})", backbone, num_slots)

    async def _start(self) -> RemoteServer:
        sizes = map(str, (len(self._slots), self.max_length, self._files.folder, self._threads))
        command = [sys.executable, "-P", llama_child.__file__, str(self._path.absolute()), *sizes]
        hint = "check that it is a whole GGUF file of a model; if memory is short, lower --num-slots or --max-length."
        server = await RemoteServer.start("llama.cpp", command, hint)
        try:
            await self._probe(server)
        except BaseException:
            await server.close()
            raise
        return server

    async def _probe(self, server: RemoteServer) -> None:
        """See which layout of states this build has, by saving one, and that it uses one that was made here.

        Raises:
            ConfigError: It is none that this program writes, or restoring does nothing.
        """
        tokens = [token for token in range(1, 64) if token != self.backbone.eos_id][:16]
        slot = {"id_slot": 0, "n_predict": 1, "temperature": 0, "cache_prompt": True}
        file, cached, reason = self._files.folder / "probe.bin", 0, "they are not used"
        await server.ask(_COMPLETION, {"prompt": tokens, **slot})
        await server.ask("/slots/0?action=save", {"filename": file.name})
        self._version = version_of(file.read_bytes())
        placeholders = self._write_file(file, self._zero_prefix(len(tokens)))
        try:
            await server.ask("/slots/0?action=restore", {"filename": file.name})
            answer = await server.ask(_COMPLETION, {"prompt": [*placeholders, tokens[0]], **slot})
            cached = int(answer["timings"]["cache_n"])
        except RequestError as error:
            reason = error.message
        if cached < len(tokens):
            what = f"this build of llama.cpp does not take saved states: {reason}."
            raise ConfigError(what, hint="install another version of xllamacpp, or use the engine torch.")

    def _write_file(self, path: Path, prefix: Prefix) -> list[int]:
        placeholders = placeholders_for(prefix, self.backbone)
        path.write_bytes(encode_file(rows_of(prefix, self.backbone), placeholders, version=self._version))
        return placeholders

    async def _generate(self, server: RemoteServer, text: RemoteText) -> FinishReason:
        assert text.slot is not None
        try:
            return await self._complete(server, text, text.slot)
        except PrefixNotUsed:
            # A text that was cancelled reached the server late, and had the slot in between.
            text.slot.file = None
            return await self._complete(server, text, text.slot)

    async def _complete(self, server: RemoteServer, text: RemoteText, slot: RemoteSlot) -> FinishReason:
        placeholders = [] if text.file is None else text.file.name
        if slot.file is not text.file:
            slot.file = None
            if text.file is not None:
                await self._restore(server, slot.number, text.file)
                slot.file = text.file
        body = {"prompt": [*placeholders, *text.request.prompt], "id_slot": slot.number, **_options(text)}
        async with contextlib.aclosing(server.stream(_COMPLETION, body)) as events:
            async for event in events:
                self._check_cached(text, int(event["timings"]["cache_n"]))
                if event["stop"]:
                    return "stop" if event["stop_type"] == "eos" else "length"
                tokens = self._tokens_of(event, text)
                text.num_new_tokens = int(event["tokens_predicted"])
                if self._take(text, tokens):
                    return "stop"
        return "length"

    async def _restore(self, server: RemoteServer, number: int, file: PrefixFile) -> None:
        """Put a prefix into a slot, and wait for it even where the text is cancelled.

        llama.cpp does this once the slot is free. If it finds nobody who waits, whatever else waits for the slot does
        so for ever.
        """
        body = {"filename": file.path.name}
        restoring = asyncio.ensure_future(server.ask(f"/slots/{number}?action=restore", body))
        try:
            await asyncio.shield(restoring)
        except asyncio.CancelledError:
            with contextlib.suppress(RequestError, OSError):
                await restoring
            raise

    def _tokens_of(self, event: Mapping[str, Any], text: RemoteText) -> list[Token]:
        """An event's tokens."""
        ids, count = [int(token) for token in event["tokens"]], int(event["tokens_predicted"]) - text.num_new_tokens
        if ids and ids[-1] not in text.ends and count > len(ids):
            # Of a character of several tokens, only the last one is said: those that the tokenizer makes of it. Some
            # tokenizers put a space in front.
            ids = self.backbone.encode(event["content"])[-count:] or ids
        found = {}
        for entry in event.get("completion_probabilities", ()):
            top = entry["top_logprobs"][: text.request.sampling.logprobs]
            best = tuple((int(one["id"]), float(one["logprob"])) for one in top)
            found[int(entry["id"])] = Token(int(entry["id"]), float(entry["logprob"]), best)
        return [found.get(token, Token(token)) for token in ids]


def _options(text: RemoteText) -> dict[str, Any]:
    """What llama.cpp is asked for, besides the prompt."""
    request, sampling = text.request, text.request.sampling
    optional = {
        "seed": text.seed,
        "n_probs": None if sampling.logprobs is None else max(1, sampling.logprobs),
        "json_schema": None if request.grammar is None else json.loads(request.grammar.schema),
    }
    return {
        # A bare text must never find a prefix that its first tokens happen to stand for.
        "cache_prompt": request.prefix is not None,
        "stream": True,
        "return_tokens": True,
        "timings_per_token": True,
        "n_predict": sampling.max_new_tokens,
        "samplers": SAMPLERS,
        **{name: getattr(sampling, name) for name in SAMPLERS},
        "logit_bias": [*map(list, sampling.logit_bias.items()), *([token, False] for token in sampling.banned)],
        **{name: value for name, value in optional.items() if value is not None},
    }
