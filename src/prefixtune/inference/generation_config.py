"""`GenerateConfig` in transformers' terms: its configuration, and what a backbone does not support."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefixtune.attention.cache import can_crop_empty_layers
from prefixtune.backbone.backbone import Backbone
from prefixtune.errors import ConfigError
from prefixtune.inference.config import GenerateConfig
from prefixtune.sampling.config import LOWEST_TEMPERATURE

__all__ = ["check_supported", "newline_tokens", "to_generation_config"]


def to_generation_config(backbone: Backbone, config: GenerateConfig, end_ids: Sequence[int] = ()) -> Any:
    """Transformers' `GenerationConfig`; nothing in it comes from the model's own one.

    Args:
        backbone: The frozen model.
        config: How to decode.
        end_ids: The tokens that end a text; empty: the tokenizer's end token.
    """
    from transformers import CompileConfig, GenerationConfig

    values: dict[str, Any] = {
        "max_new_tokens": config.max_new_tokens,
        "num_beams": config.num_beams,
        "do_sample": config.temperature > 0,
        "pad_token_id": backbone.pad_id,
        "eos_token_id": list(end_ids) if len(end_ids) > 1 else backbone.eos_id,
        "use_cache": True,
    }
    if backbone.kind == "encoder-decoder":
        values["decoder_start_token_id"] = backbone.decoder_start_id
        if backbone.forced_bos_id is not None:
            values["forced_bos_token_id"] = backbone.forced_bos_id
    if config.cache == "static" and backbone.layout.cache_layers is None:
        values["cache_implementation"] = "static"
    if config.compile:
        values["compile_config"] = CompileConfig(fullgraph=False)
        # By default transformers compiles on accelerators only.
        values["compile_config"]._compile_all_devices = True
    else:
        values["disable_compile"] = True
    if config.prompt_lookup:
        values["prompt_lookup_num_tokens"] = config.prompt_lookup
    if config.min_new_tokens:
        values["min_new_tokens"] = config.min_new_tokens
    if config.num_beams > 1:
        values["length_penalty"] = config.length_penalty
    if config.temperature > 0:
        temperature = max(config.temperature, LOWEST_TEMPERATURE)
        values |= {"temperature": temperature, "top_k": config.top_k, "top_p": config.top_p}
        if config.min_p:
            values["min_p"] = config.min_p
    if config.ban_newlines:
        values["suppress_tokens"] = newline_tokens(backbone)
    return GenerationConfig(**values)


def newline_tokens(backbone: Backbone) -> list[int]:
    """Every token whose text has a line break."""
    tokens: list[int] | None = backbone.tokenizer_cache.get("newline_tokens")
    if tokens is None:
        size = min(backbone.vocab_size, len(backbone.tokenizer))
        texts = backbone.tokenizer.batch_decode([[token] for token in range(size)])
        tokens = [token for token, text in enumerate(texts) if "\n" in text or "\r" in text]
        backbone.tokenizer_cache["newline_tokens"] = tokens
    return tokens


def check_supported(backbone: Backbone, config: GenerateConfig, assistant: Backbone | None) -> None:
    """Refuse options that a backbone or an assistant does not support.

    Raises:
        ConfigError: There is one.
    """
    if assistant is not None:
        _check_assistant(backbone, config, assistant)
    if config.compile and backbone.layout.cache_layers is None:
        raise ConfigError(
            f"decoding with {backbone.name!r} injects the prefix in every step, which cannot be compiled.",
            hint="leave compile out; the static cache works.",
        )
    static_layers, layers = _num_hidden_layers(backbone), len(backbone.geometry.get("decoder", ()))
    if config.cache == "static" and backbone.kind == "encoder-decoder" and static_layers < layers:
        raise ConfigError(
            f"a static cache has {static_layers} layers here, but the decoder of {backbone.name!r} has {layers}.",
            hint="use the dynamic cache.",
        )
    # They take the mask's last columns for their tokens'; in a static cache these are slots without a token.
    masks_padding = any(not getattr(one, "router_ignore_padding_tokens", True) for one in backbone.model.modules())
    if config.cache == "static" and masks_padding:
        raise ConfigError(
            f"the experts of {backbone.name!r} read the mask as if it ended with the text, which is wrong with a "
            "static cache.",
            hint="use the dynamic cache.",
        )
    hybrid = backbone.kind == "decoder" and not backbone.layout.packable
    if hybrid and (config.cache == "static" or config.prompt_lookup or assistant is not None):
        raise ConfigError(
            f"{backbone.name!r} caches more than keys and values: its cache cannot be shortened or preallocated.",
            hint="use the dynamic cache, without prompt_lookup and assistant.",
        )


def _check_assistant(backbone: Backbone, config: GenerateConfig, assistant: Backbone) -> None:
    if config.num_beams > 1 or config.cache != "dynamic" or config.prompt_lookup or config.response_schema:
        raise ConfigError(
            "an assistant needs num_beams = 1, the dynamic cache, no prompt look-up and no JSON schema.",
            hint="leave those out.",
        )
    if assistant.kind != backbone.kind or len(assistant.tokenizer) != len(backbone.tokenizer):
        raise ConfigError(
            f"{assistant.name!r} cannot assist {backbone.name!r}: its kind or its vocabulary differs.",
            hint="choose a smaller model of the same family.",
        )
    sizes = [one.model.config.get_text_config().vocab_size for one in (assistant, backbone)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"{assistant.name!r} cannot assist {backbone.name!r}: its vocabulary is padded to {sizes[0]:,} tokens, not "
            f"{sizes[1]:,}.",
            hint="choose a smaller model of the same family with the same vocab_size.",
        )
    unfilled = _num_hidden_layers(assistant, 0) > len(assistant.geometry.get("decoder", ()))
    if assistant.kind == "encoder-decoder" and unfilled and not can_crop_empty_layers():
        raise ConfigError(
            f"this transformers cannot use {assistant.name!r}, whose decoder has fewer layers than its encoder, as an "
            "assistant.",
            hint="upgrade transformers to 5.24, or leave the assistant out.",
        )


def _num_hidden_layers(backbone: Backbone, default: int = 1 << 30) -> int:
    """Layers of the caches that transformers makes: for an encoder-decoder, as many as its encoder has."""
    config = backbone.model.config.get_text_config(decoder=True)
    return int(getattr(config, "num_hidden_layers", default))
