"""A backbone as a GGUF file, so that llama.cpp runs the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.results import PeerError
from prefixtune.backbone.backbone import Backbone

__all__ = ["write_gguf"]


def write_gguf(path: Path, backbone: Backbone, kind: str) -> Path:
    """Write a LLaMA as llama.cpp's converter would; texts go in and out as token ids, so that merges are left out.

    Args:
        path: The file.
        backbone: The model.
        kind: Of its matrices: `F16` or `Q8_0`.

    Raises:
        PeerError: It is another architecture.
    """
    import gguf

    model, tokenizer, config = backbone.model, backbone.tokenizer, backbone.model.config
    if config.model_type != "llama":
        raise PeerError(f"{backbone.name!r} is of type {config.model_type!r}; only a LLaMA is written as GGUF here")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    special = set(tokenizer.all_special_ids)
    size = int(model.get_input_embeddings().weight.shape[0])
    kinds = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in range(size)]
    words = tokenizer.convert_ids_to_tokens(list(range(size)))
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([word or f"[unused {token}]" for token, word in enumerate(words)])
    writer.add_token_types([int(kind) for kind in kinds])
    # llama.cpp wants at least one; its product is no token, so that it is never used.
    writer.add_token_merges(["! !"])
    writer.add_eos_token_id(backbone.eos_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        if "q_proj" in name:
            tensor = _interleave(tensor, config.num_attention_heads)
        elif "k_proj" in name:
            tensor = _interleave(tensor, config.num_key_value_heads)
        _add(writer, names.get_name(name, try_suffixes=(".weight", ".bias")), tensor, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, name: str, tensor: Tensor, kind: str) -> None:
    import gguf

    numbers = tensor.float().contiguous().numpy()
    if tensor.dim() < 2:
        writer.add_tensor(name, numbers)
        return
    number = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quants.quantize(numbers, number), raw_dtype=number)


def _interleave(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head: first half and second half alternate."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return torch.stack([halves[:, 0], halves[:, 1]], dim=2).reshape(weight.shape)
