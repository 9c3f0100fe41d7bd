"""The KV connector: tells vLLM's scheduler that a prefix's positions are computed, and fills them in its workers.

Named in `--kv-transfer-config`; see docs/vllm.md. It writes with the attention layer's own cache update, because
only the attention backend knows the layout of a block.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import vllm
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole
from vllm.logger import init_logger

from prefixtune.errors import CheckpointError, ConfigError, PrefixError, short_repr
from prefixtune.interop.vllm.model import check_cache_updates, check_kv_cache, geometry_of, heads_of_rank
from prefixtune.interop.vllm.prefix_cache import KeyValues, PrefixCache
from prefixtune.prefix.folder import PrefixReference

__all__ = ["PrefixConnector"]


# vLLM imports this module before it loads the model.
if not hasattr(KVConnectorBase_V1, "bind_kv_cache_manager"):
    raise ConfigError(f"vLLM {vllm.__version__} is too old for prefixes, which need 0.30 or newer.")

logger = init_logger(__name__)
_LAYER = re.compile(r"\.(\d+)\.")
_MAX_TRACKED_BLOCKS = 4096


@dataclass(frozen=True)
class _Load:
    """A prefix to be written into the blocks of a request.

    Attributes:
        reference: The prefix.
        start: First position that is not in the blocks yet.
        blocks: The blocks of the prefix's positions.
        fault: Why the request must fail instead; empty: nothing is wrong.
    """

    reference: PrefixReference
    start: int
    blocks: list[int]
    fault: str = ""

    def slot_mapping(self, block_size: int) -> list[int]:
        """The slots of the positions that are written."""
        return [
            self.blocks[position // block_size] * block_size + position % block_size
            for position in range(self.start, self.reference.length)
        ]


@dataclass
class _ConnectorMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """What the workers must write before the next forward pass."""

    loads: list[_Load] = field(default_factory=list)


class PrefixConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Prefixes in a folder, as keys and values that vLLM need not compute.

    Raises:
        ConfigError: It cannot work with this model or setting.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        folder, max_bytes = _options(vllm_config.kv_transfer_config)
        shapes = geometry_of(vllm_config.model_config)["decoder"]
        check_kv_cache(vllm_config, kv_cache_config)
        self.block_size = int(vllm_config.cache_config.block_size)
        # In the scheduler: what to write in the next step, and each block's neighbours in its request.
        self._pending_loads: list[_Load] = []
        self._blocks_of_request: OrderedDict[int, list[int]] = OrderedDict()
        # In a worker.
        self._failed_blocks: set[int] = set()
        if role == KVConnectorRole.WORKER:
            from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
            from vllm.platforms import current_platform

            tp_size, tp_rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
            heads = heads_of_rank(shapes[0].num_kv_heads, tp_size, tp_rank)
            device = torch.device(current_platform.device_type)
            self._prefixes = PrefixCache(folder, max_bytes, shapes, heads, device, vllm_config.model_config.dtype)

    # --- in the scheduler ---------------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """How many of the prefix's positions vLLM does not have in its own blocks yet.

        Never the last token of the request, which the model itself must compute: a request without text after its
        prefix fails.
        """
        reference = _reference_of(request)
        num_loadable = 0 if reference is None else min(reference.length, request.num_tokens - 1)
        return max(num_loadable - num_computed_tokens, 0), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note which blocks must be filled."""
        reference = _reference_of(request)
        if reference is None:
            return
        fault = reference.fault
        if request.skip_reading_prefix_cache:
            # Then vLLM does not ask how many positions there are: placeholders would run as text, and their blocks be
            # found by every later request with the prefix. As faulty ones, they are evicted.
            fault = fault or "vLLM cannot use a prefix with prompt_logprobs or skip_reading_prefix_cache"
            num_external_tokens = min(reference.length, request.num_tokens - 1)
        if num_external_tokens <= 0:
            return
        if not fault and reference.length >= request.num_tokens:
            fault = f"the request has {request.num_tokens} tokens, no more than the prefix has positions"
        request_blocks = list(blocks.get_block_ids()[0])
        prefix_blocks = request_blocks[: -(-reference.length // self.block_size)]
        start = min(reference.length, request.num_tokens - 1) - num_external_tokens
        self._pending_loads.append(_Load(reference, start, prefix_blocks, fault))
        for block in prefix_blocks:
            self._blocks_of_request[block] = request_blocks
            self._blocks_of_request.move_to_end(block)
        while len(self._blocks_of_request) > _MAX_TRACKED_BLOCKS:
            self._blocks_of_request.popitem(last=False)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """Pass what was noted to the workers."""
        metadata, self._pending_loads = _ConnectorMetadata(self._pending_loads), []
        return metadata

    def update_connector_output(self, connector_output: Any) -> None:
        """Evict what was computed after a prefix that could not be loaded, even if its client has disconnected."""
        failed = connector_output.invalid_block_ids or ()
        if failed and self._kv_cache_manager is not None:
            self._kv_cache_manager.evict_blocks(
                {other for block in failed for other in self._blocks_of_request.get(block, [block])}
            )

    # --- in a worker --------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: Mapping[str, Any]) -> None:
        """Check, once they exist, that every layer's cache can be filled.

        Raises:
            ConfigError: The attention backend cannot do that.
        """
        layers = self._vllm_config.compilation_config.static_forward_context
        check_cache_updates({name: layers[name] for name in kv_caches if name in layers})

    def start_load_kv(self, forward_context: Any, **_: Any) -> None:
        """Write all prefixes that the step needs, with one cache update per layer."""
        ready: list[tuple[KeyValues, int]] = []
        slot_mapping: list[int] = []
        for load in self._get_connector_metadata().loads:
            try:
                if load.fault:
                    raise CheckpointError(load.fault)
                key_values = self._prefixes.get(load.reference)
            except (PrefixError, OSError, RuntimeError, MemoryError) as error:
                logger.error("prefix %r: %s", load.reference.name, error)
                self._failed_blocks.update(load.blocks[load.start // self.block_size :])
                continue
            ready.append((key_values, load.start))
            slot_mapping += load.slot_mapping(self.block_size)
        if not ready:
            return
        layers = [
            (name, layer)
            for name, layer in forward_context.no_compile_layers.items()
            if getattr(layer, "kv_cache", None) is not None and hasattr(layer.impl, "do_kv_cache_update")
        ]
        slots = torch.tensor(slot_mapping, dtype=torch.int64, device=layers[0][1].kv_cache.device)
        for name, layer in layers:
            index = int(_LAYER.findall(name)[0])
            key = torch.cat([key_values[index][0][start:] for key_values, start in ready])
            value = torch.cat([key_values[index][1][start:] for key_values, start in ready])
            layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slots)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: all is written before the forward pass begins."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **_: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks whose prefix could not be read: vLLM fails their requests, and no others."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed


def _options(transfer: Any) -> tuple[Path, int]:
    """The folder of prefixes, and how many bytes of them a worker may keep.

    Raises:
        ConfigError: An option is unknown, missing or wrong, or vLLM would recompute a prefix that cannot be loaded.
    """
    options = dict(transfer.kv_connector_extra_config)
    folder, mib, faults = options.pop("prefixes", None), options.pop("cache_mib", 1024), []
    if not isinstance(folder, str) or not Path(folder).is_dir():
        faults.append(f"prefixes is {short_repr(folder)}, but must be an existing folder")
    if type(mib) is not int or mib < 1:
        faults.append(f"cache_mib is {short_repr(mib)}, but must be a whole number of at least 1")
    faults += [f"there is no option {short_repr(name)}" for name in options]
    if transfer.kv_load_failure_policy != "fail":
        # Placeholders would run as ordinary tokens.
        faults.append("kv_load_failure_policy must be 'fail', or a prefix that cannot be loaded would go unnoticed")
    if faults:
        raise ConfigError(f"kv_transfer_config: {'; '.join(faults)}.", hint="see docs/vllm.md.")
    return Path(str(folder)).absolute(), mib * 2**20


def _reference_of(request: Any) -> PrefixReference | None:
    return PrefixReference.of_request(request.kv_transfer_params, request.cache_salt)
