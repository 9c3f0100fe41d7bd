"""The model that vLLM runs: its shapes, and whether it can carry prefixes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefixtune.errors import ConfigError
from prefixtune.prefix.geometry import Geometry, LayerShape
from prefixtune.prefix.rotation import longrope_limit

_DRAFTS_WITHOUT_MODEL = (None, "ngram", "ngram_gpu", "suffix")
_HINT = "serve it with `prefixtune serve --engine torch`"


def geometry_of(model_config: Any) -> Geometry:
    """The shapes of the model that vLLM's `ModelConfig` describes.

    Raises:
        ConfigError: This plugin cannot put a prefix in front of such a model; the message says why.
    """
    reasons = []
    if model_config.is_encoder_decoder:
        reasons.append("it is an encoder-decoder")
    if model_config.use_mla:
        reasons.append("its attention is latent (MLA), without keys and values of its own")
    if model_config.is_hybrid or model_config.is_attention_free:
        reasons.append("not all of its layers are attention")
    if model_config.is_multimodal_model:
        reasons.append("it reads more than text, and its positions depend on that")
    limit, max_positions = longrope_limit(model_config.hf_text_config), getattr(model_config, "max_model_len", None)
    hint = _HINT
    if limit is not None and max_positions is not None and max_positions > limit:
        reasons.append(f"with more than {limit:,} positions all its keys turn by other frequencies (LongRoPE)")
        hint = f"limit it with --max-model-len {limit}, or {_HINT}"
    _refuse(model_config, reasons, hint)
    head_dim = model_config.get_head_size()
    shape = LayerShape(model_config.get_total_num_kv_heads(), head_dim, head_dim)
    return {"decoder": (shape,) * model_config.get_total_num_hidden_layers()}


def check_kv_cache(vllm_config: Any, kv_cache_config: Any) -> None:
    """Refuse a KV cache that would round a prefix, or let it drop out of sight.

    Raises:
        ConfigError: With all reasons.
    """
    reasons, hint = [], _HINT
    dtype = str(vllm_config.cache_config.cache_dtype)
    if dtype not in ("auto", str(vllm_config.model_config.dtype).removeprefix("torch.")):
        reasons.append(f"its cache has the type {dtype}; leave --kv-cache-dtype at auto")
    groups = kv_cache_config.kv_cache_groups if kv_cache_config is not None else []
    specs = [spec for group in groups for spec in _specs_of(group.kv_cache_spec)]
    for name, what in (("sliding_window", "have a sliding window"), ("attention_chunk_size", "attend in chunks")):
        size = min((size for spec in specs if (size := getattr(spec, name, None))), default=None)
        # One that holds every position never takes effect.
        if size is not None and size < vllm_config.model_config.max_model_len:
            reasons.append(f"some of its layers {what} of {size} positions, and the prefix would drop out of it")
            also = " (--disable-sliding-window does that, too)" if name == "sliding_window" else ""
            hint = f"limit it with --max-model-len {size}{also}, or {_HINT}"
    if len(groups) > 1:
        reasons.append("its layers have caches of several kinds")
    drafts = getattr(vllm_config.speculative_config, "method", None)
    if drafts not in _DRAFTS_WITHOUT_MODEL:
        reasons.append(f"its speculative decoding uses a model of its own ({drafts}), which has no prefix")
    if vllm_config.parallel_config.decode_context_parallel_size > 1:
        reasons.append("decode context parallelism distributes positions")
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        reasons.append("with pipeline parallelism, a worker has only some of its layers")
    _refuse(vllm_config.model_config, reasons, hint)


def check_cache_updates(layers: Mapping[str, Any]) -> None:
    """Refuse an attention backend that writes keys and values only while it attends: a prefix's come from outside.

    Args:
        layers: vLLM's attention layers with a KV cache, by their names.

    Raises:
        ConfigError: A layer has such a backend.
    """
    for name, layer in layers.items():
        if not hasattr(layer.impl, "do_kv_cache_update"):
            what = f"the attention backend of {name!r}, {type(layer.impl).__name__}, has no do_kv_cache_update."
            raise ConfigError(what, hint="choose another one with --attention-backend.")


def _specs_of(spec: Any) -> list[Any]:
    """The caches of a group's layers, which may have a specification each."""
    return list(getattr(spec, "kv_cache_specs", {"": spec}).values())


def _refuse(model_config: Any, reasons: list[str], hint: str) -> None:
    if reasons:
        raise ConfigError(
            f"vLLM cannot serve prefixes with {model_config.model!r}: {'; '.join(reasons)}.", hint=f"{hint}."
        )


def heads_of_rank(num_kv_heads: int, tp_size: int, tp_rank: int) -> slice:
    """The KV heads of a tensor-parallel rank: an equal share, or a single one where there are more ranks than heads.

    >>> [heads_of_rank(8, 4, rank) for rank in (0, 3)], heads_of_rank(2, 4, 3)
    ([slice(0, 2, None), slice(6, 8, None)], slice(1, 2, None))

    Raises:
        ConfigError: The heads cannot be divided evenly.
    """
    if num_kv_heads % tp_size and tp_size % num_kv_heads:
        hint = "choose a tensor-parallel size that divides their number, or is a multiple of it."
        raise ConfigError(f"{num_kv_heads} KV heads cannot be divided between {tp_size} devices.", hint=hint)
    first = tp_rank * num_kv_heads // tp_size
    return slice(first, first + max(num_kv_heads // tp_size, 1))
