"""A tiny configuration of any model type: the type's own defaults, with every size cut down by its name.

Which settings a type has is read from its configuration, and so are the kinds of layers, which all stay. What the names
do not tell (divisors, settings that must fit each other) stands in `SPECIAL`.

Knows nothing of prefixes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["model_types", "tiny_config"]

_WIDTH, _INNER, _LAYERS, _HEADS, _POSITIONS = 32, 48, 3, 4, 160

_SIZES: Mapping[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "embedding_size"), _WIDTH),
    **dict.fromkeys(
        ("word_embed_proj_dim", "lru_width", "model_dim", "input_embedding_size", "projection_dim"), _WIDTH
    ),
    **dict.fromkeys(("output_embedding_size", "text_embed_dim", "d_latents"), _WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "dff", "dim_ff", "hidden_dim", "d_inner"), _INNER),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "intermediate_size_mlp"), _INNER),
    **dict.fromkeys(("shared_intermediate_size", "mlp_dim", "dense_intermediate_size"), _INNER),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 24),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"), _LAYERS),
    **dict.fromkeys(("num_encoder_layers", "num_blocks", "depth"), _LAYERS),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), _HEADS),
    **dict.fromkeys(("attention_heads", "num_encoder_attention_heads", "decoder_attention_heads"), _HEADS),
    "num_decoder_attention_heads": _HEADS,
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("head_dim", "d_head", "d_kv", "attention_head_size", "dim_head", "v_head_dim"), 8),
    **dict.fromkeys(("qk_head_dim", "qk_nope_head_dim", "global_head_dim", "swa_head_dim"), 8),
    "qk_rope_head_dim": 4,
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"), _POSITIONS),
    **dict.fromkeys(("max_sequence_length", "max_target_positions", "context_length"), _POSITIONS),
    **dict.fromkeys(("max_encoder_position_embeddings", "max_decoder_position_embeddings"), _POSITIONS),
    **dict.fromkeys(("sliding_window", "attention_window_size", "local_attention", "window_size"), 4),
    "attention_chunk_size": 8,
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim", "mamba_d_state", "state_size"), 8),
    **dict.fromkeys(("ssm_state_size", "mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "num_mem_blocks"), 1),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank", "adapter_rank"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank"), 8),
    **dict.fromkeys(("relative_attention_num_buckets", "num_buckets", "position_buckets"), 8),
    **dict.fromkeys(("relative_attention_max_distance", "relative_max_distance"), 20),
    # What looks at pictures and sound, and is not run here.
    **dict.fromkeys(("image_size", "crop_size"), 16),
    **dict.fromkeys(("patch_size",), 8),
    **dict.fromkeys(("out_hidden_size", "vision_output_dim", "mm_hidden_size", "encoder_embed_dim"), _WIDTH),
    **dict.fromkeys(("num_mel_bins",), 8),
    **dict.fromkeys(("max_source_positions",), 20),
}
"""Name of a setting -> its value, where the type has such a setting that is a number."""

_NEEDED = ("head_dim", "num_key_value_heads", "intermediate_size", "n_routed_experts")
"""Settings without a default that a model needs all the same."""

_VOCABULARY = ("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "src_vocab_size", "tgt_vocab_size")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

_EVEN_HEADS = {"num_key_value_heads": _HEADS}

SPECIAL: Mapping[str, Mapping[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 100, "encoder_hash_byte_group_size": [3]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2}, "ffn_config": {"hidden_size": _WIDTH, "ffn_hidden_size": _INNER}},
    "diffllama": {"attention_dropout": 0.0},
    "dots1": {"n_shared_experts": 1, "num_experts_per_tok": 2},
    "dory": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
        # The random values of its scales are about as large; of smaller ones attention's scores would reach hundreds.
        "initializer_range": 0.25,
    },
    "dots3_note": _EVEN_HEADS,
    "dots3_note_text": _EVEN_HEADS,
    "esmc": _EVEN_HEADS,
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "luke": {"entity_vocab_size": 20, "entity_emb_size": 16},
    "neomme": {"head_dim": 16},
    "reformer": {
        "axial_pos_shape": [10, 16],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh", "local"],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "feed_forward_size": _INNER,
        "num_hashes": 1,
    },
    "roc_bert": {"pronunciation_vocab_size": 120, "shape_vocab_size": 120},
    "qwen4_exp_text": {"token_budget": 8, "compress_ratio": 4, "indexer_head_dim": 8},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
"""Model type -> settings that its names do not give."""


def model_types() -> dict[str, str]:
    """Every type of transformers that reads or writes text, by name: `decoder`, `encoder-decoder` or `encoder`."""
    from transformers.models.auto import modeling_auto as auto

    types = dict.fromkeys(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "encoder")
    types |= dict.fromkeys(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - types.keys(), "decoder")
    types |= dict.fromkeys(auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "encoder-decoder")
    return dict(sorted(types.items()))


def tiny_config(model_type: str, tokenizer: Any) -> Any:
    """The type's configuration, cut down, for this tokenizer."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return AutoConfig.for_model(model_type, **_settings(CONFIG_MAPPING[model_type], tokenizer, model_type))


def _settings(kind: Any, tokenizer: Any, model_type: str) -> dict[str, Any]:
    """What to give to a class of configurations."""
    default = kind()
    known = default.to_dict()
    given: dict[str, Any] = {}
    for name, value in known.items():
        if name in _SIZES and (value is None or (isinstance(value, int) and not isinstance(value, bool))):
            # A setting that is off stays off, unless it is a size.
            if value is not None or name in _NEEDED:
                given[name] = _SIZES[name]
        elif name in _VOCABULARY:
            given[name] = len(tokenizer)
        elif name in _TOKENS:
            given[name] = getattr(tokenizer, name)
        elif "drop" in name and isinstance(value, float):
            given[name] = 0.1
        elif name.endswith("_token_id") and isinstance(value, int) and value >= len(tokenizer):
            # Pictures and sound: a token that no text holds.
            given[name] = tokenizer.pad_token_id
    if "kv_lora_rank" in given:
        # Latent attention: every head has keys of its own, and only a part of them is rotated.
        given |= {"num_key_value_heads": _HEADS} if "num_key_value_heads" in known else {}
        given |= {"head_dim": 4} if "head_dim" in known else {}
        given |= {"qk_head_dim": 12} if "qk_head_dim" in known else {}
    if "tie_word_embeddings" in known:
        given["tie_word_embeddings"] = False
    if known.get("is_encoder_decoder"):
        given |= {"decoder_start_token_id": tokenizer.bos_token_id, "forced_eos_token_id": None}
    given |= _layer_kinds(known)
    for name, part in getattr(kind, "sub_configs", {}).items():
        part = type(getattr(default, name)) if getattr(default, name, None) is not None else part
        if hasattr(part, "model_type") and name in known:
            given[name] = _settings(part, tokenizer, part.model_type)
    return {**given, **SPECIAL.get(model_type, {})}


def _layer_kinds(known: Mapping[str, Any]) -> dict[str, Any]:
    """Every kind of layer that the type has, in as few layers as hold them all."""
    lists = {n: v for n, v in known.items() if n in ("layer_types", "layers_block_type", "mlp_layer_types") and v}
    if not lists:
        return {}
    kinds: dict[str, Sequence[str]] = {name: list(dict.fromkeys(values)) for name, values in lists.items()}
    count = max(_LAYERS, *(len(each) for each in kinds.values()))
    made: dict[str, Any] = {name: [each[n % len(each)] for n in range(count)] for name, each in kinds.items()}
    return {**made, "num_hidden_layers": count}
