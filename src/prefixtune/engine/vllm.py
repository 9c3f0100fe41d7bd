"""vLLM behind the interface of every engine: texts by token ids, a prefix by the connector of `interop.vllm`.

vLLM's server runs as a child process, or somebody else runs it. Each prefix that is asked for, joined ones too, is
written into a folder that vLLM reads. In a prompt, P placeholders stand for it, whose keys and values the connector
puts into vLLM's cache; it fails the request if it cannot.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2

from prefixtune.backbone.backbone import Backbone
from prefixtune.engine.remote import PENALTIES, SAMPLERS, RemoteEngine, RemoteText
from prefixtune.engine.remote_server import RemoteServer
from prefixtune.engine.request import FinishReason, Token
from prefixtune.errors import BackboneError, ConfigError, RequestError
from prefixtune.prefix.folder import PrefixReference, hash_file
from prefixtune.prefix.prefix import Prefix, save_prefix

_COMPLETIONS = "/v1/completions"
_LOWEST_BIAS = -100
"""What vLLM and OpenAI allow; nothing comes up against it."""


@dataclass(frozen=True)
class VllmConfig:
    """How vLLM runs.

    Attributes:
        model: Folder or hub id of the model that vLLM loads.
        num_slots: Texts that run at once.
        max_length: Most positions of a text, prefix included; 0: as many as vLLM allows.
        dtype: Of the weights; `auto`: vLLM's choice.
        cache_mib: Memory for a worker's loaded prefixes.
        python: Of the environment with vLLM; empty: this one.
        arguments: Further options of vLLM.
        url: Of a server that runs already, whose key is in VLLM_API_KEY; empty: a child process is started.
        folder: With a url: what its connector has as `prefixes`.
    """

    model: str = ""
    num_slots: int = 32
    max_length: int = 0
    dtype: str = "auto"
    cache_mib: int = 1024
    python: str = ""
    arguments: tuple[str, ...] = ()
    url: str = ""
    folder: str = ""


class VllmEngine(RemoteEngine):
    """Generates text by vLLM, for a decoder-only model.

    Args:
        backbone: The model's tokenizer and shapes; its weights are not used.
        config: How it runs.

    Raises:
        BackboneError: vLLM does not start, cannot be reached, or cannot serve prefixes of this model.
        ConfigError: A folder is missing, or cannot be written.
    """

    lacks = ("prompt_logprobs",)

    def __init__(self, backbone: Backbone, config: VllmConfig) -> None:
        self.config, self._placeholder = config, _choose_placeholder(backbone.tokenizer)
        self._tried: Prefix | None = None
        folder = Path(config.folder) if config.url else None
        if folder is not None and not folder.is_dir():
            what = f"there is no folder {config.folder!r} for vLLM's prefixes."
            raise ConfigError(what, hint="name the one that its connector has as `prefixes`.")
        super().__init__("vLLM" if config.url else f"vLLM ({config.dtype})", backbone, config.num_slots, folder)

    def available_tokens(self, prompt_tokens: int, prefix_length: int) -> int:
        """Most tokens that can be generated after a prompt; 0 or less: the prompt itself is too long."""
        # For vLLM, the last token takes a position too.
        return self.max_length - prefix_length - prompt_tokens

    async def _start(self) -> RemoteServer:
        config = self.config
        server = None
        try:
            if config.url:
                server = RemoteServer("vLLM", config.url, os.environ.get("VLLM_API_KEY", ""))
            else:
                server = await _start_child(config, self.backbone.name, self._files.folder)
            model = (await server.ask("/v1/models"))["data"][0]
            limits = (int(model["max_model_len"]), config.max_length)
            self._model, self.max_length = str(model["id"]), min(filter(None, limits))
            if config.url:
                await self._probe(server)
        except (OSError, LookupError, ValueError, TypeError, RequestError, httpx2.InvalidURL) as error:
            if server is not None:
                await server.close()
            what = f"{config.url or 'the child process'} is no server of vLLM with prefixes: {error}"
            hint = "start vLLM as docs/vllm.md says, and give its address, folder and key (VLLM_API_KEY)."
            raise BackboneError(what, hint=hint) from error
        return server

    async def _probe(self, server: RemoteServer) -> None:
        """See that a server that somebody else runs has the connector, the backbone's shapes and the folder.

        Raises:
            RequestError: It has not.
        """
        self._tried = self._tried or self._zero_prefix(1)
        file = self._files.take(self._tried)
        body = {"model": self._model, "prompt": [self._placeholder] * 2, "max_tokens": 1}
        try:
            await server.ask(_COMPLETIONS, {**body, **file.name.request_fields})
        finally:
            self._files.release(file)
        with contextlib.suppress(RequestError):
            await server.ask(_COMPLETIONS, {**body, **replace(file.name, sha256="0" * 64).request_fields})
            raise ConnectionError("it has no connector for prefixes.")

    def _write_file(self, path: Path, prefix: Prefix) -> PrefixReference:
        # As it is served: no more bytes than that.
        save_prefix(path, prefix, dtype=prefix.dtype)
        return PrefixReference(path.stem, hash_file(path), prefix.length())

    async def _generate(self, server: RemoteServer, text: RemoteText) -> FinishReason:
        reason: FinishReason = "length"
        async with contextlib.aclosing(server.stream(_COMPLETIONS, self._body(text))) as events:
            async for event in events:
                if not event["choices"]:
                    # Said with --enable-prompt-tokens-details.
                    cached = (event["usage"].get("prompt_tokens_details") or {}).get("cached_tokens")
                    self._check_cached(text, cached)
                    break
                if reason == "stop":
                    continue
                (choice,) = event["choices"]
                if choice.get("finish_reason") not in (None, "stop", "length"):
                    # As it does with all texts when it is told to end.
                    raise ConnectionError(f"vLLM has ended the text: {choice['finish_reason']}")
                tokens = _tokens(choice["token_ids"], choice.get("logprobs"), text.request.sampling.logprobs)
                text.num_new_tokens += len(tokens)
                if self._take(text, tokens) or choice.get("finish_reason") == "stop":
                    reason = "stop"
                if text.pieces.stopped:
                    break
        return reason

    def _body(self, text: RemoteText) -> dict[str, Any]:
        """What vLLM is asked for."""
        request, sampling = text.request, text.request.sampling
        biases = {str(token): float(bias) for token, bias in sampling.logit_bias.items()}
        biases |= dict.fromkeys(map(str, sampling.banned), float(_LOWEST_BIAS))
        optional = {
            "seed": text.seed,
            "logprobs": sampling.logprobs,
            "logit_bias": biases or None,
            "structured_outputs": None if request.grammar is None else {"json": json.loads(request.grammar.schema)},
        }
        return {
            "model": self._model,
            "prompt": [self._placeholder] * request.prefix_length + list(request.prompt),
            "max_tokens": sampling.max_new_tokens,
            "min_tokens": sampling.min_new_tokens,
            # The end tokens are the backbone's and the request's, whatever vLLM has read elsewhere.
            "ignore_eos": True,
            "stop_token_ids": sorted(text.ends),
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **{name: getattr(sampling, name) for name in (*SAMPLERS, *PENALTIES)},
            **{name: value for name, value in optional.items() if value is not None},
            **({} if text.file is None else text.file.name.request_fields),
        }


def _tokens(ids: list[int], logprobs: Mapping[str, Any] | None, count: int | None) -> tuple[Token, ...]:
    """Tokens with their log-probabilities, which have names such as `token_id:7`."""
    if logprobs is None or count is None:
        return tuple(map(Token, ids))
    tokens = []
    for token, logprob, top in zip(ids, logprobs["token_logprobs"], logprobs["top_logprobs"], strict=False):
        # The token itself comes first, then the likeliest ones.
        best = sorted(((int(name.partition(":")[2]), value) for name, value in top.items()), key=lambda pair: -pair[1])
        tokens.append(Token(token, logprob, tuple(best[:count])))
    return tuple(tokens)


def _choose_placeholder(tokenizer: Any) -> int:
    """A special token other than the end token: it is never computed, but repetition penalties count it."""
    eos_id = tokenizer.eos_token_id
    ids = [tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids]
    return int(next((token for token in ids if token is not None and token != eos_id), eos_id or 0))


async def _start_child(config: VllmConfig, name: str, folder: Path) -> RemoteServer:
    """Start vLLM's server, and wait until it has loaded the model.

    Args:
        config: How it runs.
        name: The model's in its API.
        folder: Of the prefixes.

    Raises:
        BackboneError: It ends before.
    """
    transfer = {
        "kv_connector": "PrefixConnector",
        "kv_connector_module_path": "prefixtune.interop.vllm.connector",
        "kv_role": "kv_consumer",
        "kv_connector_extra_config": {"prefixes": str(folder.absolute()), "cache_mib": config.cache_mib},
    }
    options = {
        "--served-model-name": name,
        "--dtype": config.dtype,
        "--max-num-seqs": config.num_slots,
        "--max-model-len": config.max_length or "",
        # What a model's authors recommend is not what a request asks for.
        "--generation-config": "vllm",
        "--kv-transfer-config": json.dumps(transfer),
    }
    flags = [str(part) for option, value in options.items() if value != "" for part in (option, value)]
    flags += ["--enable-prompt-tokens-details", "--disable-uvicorn-access-log", *config.arguments, "--uds"]
    python = config.python or sys.executable
    return await RemoteServer.start(
        "vLLM",
        [python, "-m", "prefixtune.interop.vllm.child", config.model, *flags],
        f"{python} needs vLLM, jaxtyping and this program (docs/vllm.md). "
        'If memory is short, also without a GPU: --vllm-args="--gpu-memory-utilization 0.4".',
        VLLM_API_KEY="",
        # It reports usage over the network unless it is told not to.
        VLLM_NO_USAGE_STATS=os.environ.get("VLLM_NO_USAGE_STATS", "1"),
        # Its processes leave semaphores to be cleaned up when it ends, which is no news for a terminal.
        PYTHONWARNINGS=f"{os.environ.get('PYTHONWARNINGS', '')},ignore::UserWarning:multiprocessing.resource_tracker",
    )
