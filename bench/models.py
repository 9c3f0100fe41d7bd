"""Models to measure: backbones by name, and random ones of known models' shapes, made on their device."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.packaged import PRETRAINED, pretrained_folder
from prefixtune.errors import BackboneError

_LLAMA_3: dict[str, Any] = {
    "vocab_size": 128_256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        **_LLAMA_3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {**_LLAMA_3, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32},
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    },
}
"""Configurations of LLaMAs; their weights are random, so that they say something of speed and memory alone."""


def make_model(name: str, dtype: str, device: str) -> Any:
    """A model of transformers, for generating or training.

    Args:
        name: Of `SHAPES`, or as `load_backbone` takes it.
        dtype: Its name in torch.
        device: Where it is made, or read to.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if name not in SHAPES:
        model: Any = AutoModelForCausalLM.from_pretrained(model_folder(name), dtype=getattr(torch, dtype))
        return model.to(device).eval()
    tokens = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM._from_config(LlamaConfig(**tokens, **SHAPES[name]), dtype=getattr(torch, dtype)).eval()


def make_backbone(name: str, dtype: str, device: str) -> Backbone:
    """A backbone; arguments as for `make_model`."""
    if name not in SHAPES:
        return load_backbone(name, dtype=dtype, device=device)
    return Backbone.from_model(make_model(name, dtype, device), make_tokenizer(), name)


def cache_mib(backbone: Backbone, texts: int, positions: int) -> int:
    """The memory that an engine needs for the keys and values of so many texts of so many positions."""
    each = sum(shape.size for shape in backbone.geometry["decoder"])
    return texts * positions * each * backbone.dtype.itemsize // 2**20 + 1


def make_tokenizer() -> Any:
    """A tokenizer of a token per byte, for models that nobody reads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def save_model(name: str, folder: Path, dtype: str = "float32", device: str = "cpu") -> Path:
    """Write a random model and its tokenizer as files; returns the folder."""
    make_model(name, dtype, device).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def model_folder(backbone_name: str) -> str:
    """What transformers' `from_pretrained` takes for a backbone.

    Raises:
        BackboneError: The backbone is not prepared.
    """
    if backbone_name not in PRETRAINED:
        return backbone_name
    folder = pretrained_folder(backbone_name)
    if folder is None:
        raise BackboneError(f"{backbone_name!r} is not prepared on this machine yet.", hint="run `prefixtune prepare`.")
    return str(folder)


def silence_peft() -> None:
    """Ignore transformers' warnings of names that PEFT 0.21 uses, and show no progress of loading."""
    from transformers.utils import logging

    for name in ("past_key_values", "is_gradient_checkpointing"):
        warnings.filterwarnings("ignore", f"`{name}` is deprecated", FutureWarning)
    logging.disable_progress_bar()
