"""The KV connector: in vLLM's scheduler it says that a prefix's positions are computed, in its workers it fills them.

Named in `--kv-transfer-config`; see docs/serving.md. Prefixes are read by the workers, from a bounded cache, and
written with the attention layer's own cache update, as the layout of the blocks is the backend's affair.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole
from vllm.logger import init_logger

from prefixtune.errors import CheckpointError, ConfigError, PrefixError
from prefixtune.interop.vllm.settings import Asked, Settings, geometry_of, heads_of_rank, version_of
from prefixtune.prefix.artifact import read_artifact
from prefixtune.prefix.folder import path_of
from prefixtune.prefix.prefix import Prefix

__all__ = ["PrefixConnector"]


logger = init_logger(__name__)
_LAYER = re.compile(r"\.(\d+)\.")
_REMEMBERED = 4096

_Pairs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Load:
    """A prefix, from a position on, into the blocks of a request.

    Attributes:
        asked: Which.
        start: First position that is not there yet.
        blocks: Of the prefix's positions.
        fault: Why it must not be: the request fails.
    """

    asked: Asked
    start: int
    blocks: list[int]
    fault: str = ""


@dataclass
class _Loads(KVConnectorMetadata):  # type: ignore[misc]
    """What the workers are to write before the next forward pass."""

    loads: list[_Load] = field(default_factory=list)


class PrefixConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Prefixes from a folder, as keys and values that need not be computed.

    Raises:
        ConfigError: The model or a setting is one that this cannot work with.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.settings = Settings.from_vllm(vllm_config)
        self.geometry = geometry_of(vllm_config.model_config)["decoder"]
        _check_cache(vllm_config, kv_cache_config)
        self.block_size = int(vllm_config.cache_config.block_size)
        self.dtype: torch.dtype = vllm_config.model_config.dtype
        self._pending: list[_Load] = []
        self._cache: OrderedDict[Asked, tuple[_Pairs, int]] = OrderedDict()
        self._bytes = 0
        self._failed: set[int] = set()
        self._bad: OrderedDict[Asked, str] = OrderedDict()
        self._together: OrderedDict[int, list[int]] = OrderedDict()
        if role == KVConnectorRole.WORKER:
            from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

            ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
            self.heads = heads_of_rank(self.geometry[0].num_kv_heads, ranks, rank)

    # --- in the scheduler ---------------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """How many of the prefix's positions are not in vLLM's own blocks already.

        Never the last token, which the model itself must compute: a request without text behind its prefix is no
        request of the server's making, and fails.
        """
        asked = self._asked(request)
        wanted = 0 if asked is None else min(asked.length, request.num_tokens - 1)
        return max(wanted - num_computed_tokens, 0), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note which blocks are to be filled."""
        asked = self._asked(request)
        if num_external_tokens <= 0 or asked is None:
            return
        fault = ""
        if not asked.is_proven:
            fault = "the request's proof is not this engine's: all servers and engines need one secret"
        elif asked.length >= request.num_tokens:
            fault = f"the request has {request.num_tokens} tokens, no more than the prefix has positions"
        every = list(blocks.get_block_ids()[0])
        taken = every[: -(-asked.length // self.block_size)]
        start = min(asked.length, request.num_tokens - 1) - num_external_tokens
        self._pending.append(_Load(asked, start, taken, fault))
        for block in taken:
            self._together[block] = every
            self._together.move_to_end(block)
        while len(self._together) > _REMEMBERED:
            self._together.popitem(last=False)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """Hand what was noted to the workers."""
        told, self._pending = _Loads(self._pending), []
        return told

    def update_connector_output(self, connector_output: Any) -> None:
        """Let nobody share what was computed behind a prefix that could not be loaded, even if its client has left."""
        failed = connector_output.invalid_block_ids or ()
        if failed and self._kv_cache_manager is not None:
            self._kv_cache_manager.evict_blocks(
                {each for block in failed for each in self._together.get(block, [block])}
            )

    def _asked(self, request: Any) -> Asked | None:
        return Asked.from_parameters(request.kv_transfer_params, self.settings.secret)

    # --- in a worker --------------------------------------------------------------------------------------------------

    def start_load_kv(self, forward_context: Any, **_: Any) -> None:
        """Write all prefixes that the step needs, one cache update a layer."""
        told = self._get_connector_metadata()
        ready: list[tuple[_Pairs, int]] = []
        slots: list[int] = []
        for load in told.loads:
            try:
                if load.fault:
                    raise CheckpointError(load.fault)
                pairs = self._pairs(load.asked)
            except (PrefixError, OSError, RuntimeError, MemoryError) as error:
                logger.error("prefix %r: %s", load.asked.name, error)
                self._failed.update(load.blocks[load.start // self.block_size :])
                continue
            ready.append((pairs, load.start))
            slots += [
                load.blocks[place // self.block_size] * self.block_size + place % self.block_size
                for place in range(load.start, load.asked.length)
            ]
        if not ready:
            return
        layers = [
            (name, layer)
            for name, layer in forward_context.no_compile_layers.items()
            if getattr(layer, "kv_cache", None) is not None and hasattr(layer.impl, "do_kv_cache_update")
        ]
        mapping = torch.tensor(slots, dtype=torch.int64, device=layers[0][1].kv_cache.device)
        for name, layer in layers:
            number = int(_LAYER.findall(name)[0])
            key = torch.cat([pairs[number][0][start:] for pairs, start in ready])
            value = torch.cat([pairs[number][1][start:] for pairs, start in ready])
            layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, mapping)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: all is written before the forward pass begins."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **_: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks whose prefix could not be read: vLLM fails their requests, and theirs alone."""
        failed, self._failed = self._failed, set()
        return failed

    def _pairs(self, asked: Asked) -> _Pairs:
        """Per layer, this rank's keys and values: (P, KV heads, D)."""
        held = self._cache.get(asked)
        if held is not None:
            self._cache.move_to_end(asked)
            return held[0]
        if asked in self._bad:
            raise CheckpointError(self._bad[asked])
        with tempfile.TemporaryDirectory(prefix="prefixtune-") as private:
            # A copy, as reading maps the file, which may be written to meanwhile.
            source, copy = path_of(self.settings.folder, asked.name), Path(private) / "prefix.safetensors"
            before = version_of(source)
            shutil.copyfile(source, copy)
            if not before == asked.version == version_of(source):
                raise CheckpointError("its file was replaced while the request waited.", hint="send it again.")
            try:
                pairs = self._fitted(read_artifact(copy).detach())
            except PrefixError as error:
                # The next request is not to read it once more.
                self._bad[asked] = error.message.replace(str(copy), "its file")
                if len(self._bad) > _REMEMBERED:
                    self._bad.popitem(last=False)
                raise
        size = sum(part.numel() * part.element_size() for pair in pairs for part in pair)
        self._cache[asked] = pairs, size
        self._bytes += size
        while self._bytes > self.settings.cache_bytes and len(self._cache) > 1:
            self._bytes -= self._cache.popitem(last=False)[1][1]
        return pairs

    def _fitted(self, prefix: Prefix) -> _Pairs:
        if prefix.geometry != {"decoder": self.geometry}:
            raise CheckpointError("its shapes are not the model's.", hint="get the file again.")
        device = self._device()
        pairs = [
            (
                key[self.heads].transpose(0, 1).to(device, self.dtype).contiguous(),
                value[self.heads].transpose(0, 1).to(device, self.dtype).contiguous(),
            )
            for key, value in prefix.layers["decoder"]
        ]
        if not all(bool(torch.isfinite(part).all()) for pair in pairs for part in pair):
            raise CheckpointError(f"it holds numbers that {self.dtype} cannot hold.", hint="serve in bfloat16.")
        return pairs

    def _device(self) -> torch.device:
        from vllm.platforms import current_platform

        return torch.device(current_platform.device_type)


def _check_cache(vllm_config: Any, kv_cache_config: Any) -> None:
    """Refuse caches that a prefix would not stay visible in, or be rounded in.

    Raises:
        ConfigError: With all reasons.
    """
    reasons = []
    kind = str(vllm_config.cache_config.cache_dtype)
    if kind not in ("auto", str(vllm_config.model_config.dtype).removeprefix("torch.")):
        reasons.append(f"its cache is of type {kind}; leave --kv-cache-dtype at auto")
    groups = kv_cache_config.kv_cache_groups if kv_cache_config is not None else []
    specs = [group.kv_cache_spec for group in groups]
    if len(specs) > 1 or any(getattr(spec, "sliding_window", None) for spec in specs):
        reasons.append("some of its layers look through a sliding window, out of which the prefix would fall")
    if any(getattr(spec, "attention_chunk_size", None) for spec in specs):
        reasons.append("some of its layers attend in chunks")
    drafts = getattr(vllm_config.speculative_config, "method", None)
    if drafts not in (None, "ngram", "ngram_gpu", "suffix"):
        reasons.append(f"its guesses come from a model of their own ({drafts}), which has no prefix")
    if vllm_config.parallel_config.decode_context_parallel_size > 1:
        reasons.append("decode context parallelism deals out positions")
    if reasons:
        raise ConfigError(
            f"vLLM cannot serve prefixes with {vllm_config.model_config.model!r}: {'; '.join(reasons)}.",
            hint="serve it with `prefixtune serve --engine embedded`.",
        )
