"""Names of the doctor's checks, which of them fail, and ways to sabotage attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AttentionInterface

from prefixtune.attention.injection import Injection, current_injection
from prefixtune.attention.registry import ATTENTION, attend
from prefixtune.doctor.examine import examine
from zoo import make_tokenizer

REGISTRY = "every layer attends through the registry"
LOADING = "the self-check of loading passes"
OWN = "no prefix = transformers' own attention"
LAYERS = "every layer receives the prefix"
GRADIENTS = "every prefix slot receives a gradient"
ROUTES = "injected = prefilled"
PADDING = "padded = unpadded"
MIXED = "mixed prefixes = one by one"
PACKING = "packed = one pair at a time"
GENERATION = "generation uses the prefix"
GREEDY = "cached decoding = full recomputation"
WINDOW = "sliding windows keep the prefix"
EVALUATION = "dropout stays off in training mode"
CHECKPOINTING = "gradient checkpointing changes nothing"

ALL = [
    REGISTRY, LOADING, OWN, LAYERS, GRADIENTS, ROUTES, PADDING, MIXED, PACKING, GENERATION, GREEDY, WINDOW, EVALUATION,
    CHECKPOINTING,
]  # fmt: skip
OF_DECODERS_ONLY = {ROUTES}
OF_GENERATION = {PACKING, GENERATION, GREEDY}

Make = Callable[..., Any]


def failed(backbone: Any, **options: Any) -> dict[str, str]:
    """The names of the checks that fail, and what they say."""
    return {check.name: check.detail for check in examine(backbone, **options) if not check.passed}


def passing(backbone: Any, **options: Any) -> list[str]:
    """The names of all checks, none of which fails."""
    checks = examine(backbone, **options)
    assert [check for check in checks if not check.passed] == []
    assert all(check.detail for check in checks)
    return [check.name for check in checks]


def patch_attention(monkeypatch: pytest.MonkeyPatch, attend: Callable[..., Any]) -> None:
    """Register another attention function under this project's name, for the length of a test."""
    monkeypatch.setitem(AttentionInterface._global_mapping, ATTENTION, attend)


def make_barely_moved_model(name: str) -> Any:
    """An encoder-decoder as transformers makes it, whose encoder hardly matters to the logits."""
    tokenizer = make_tokenizer()
    tokens = {f"{part}_token_id": getattr(tokenizer, f"{part}_token_id") for part in ("bos", "eos", "pad")}
    sizes = {"encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 2}
    config = getattr(transformers, f"{name}Config")(
        **tokens,
        **sizes,
        vocab_size=len(tokenizer),
        d_model=64,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_position_embeddings=160,
        decoder_start_token_id=tokenizer.bos_token_id,
        forced_eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    return model.eval()


def attend_changed_at(site: str, change: Callable[[dict[str, Any]], None]) -> Callable[..., Any]:
    """The attention function, with the arguments changed at one site; packed rows are left alone."""

    def patched(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        # In generation the prefix travels beside the call.
        injection = kwargs.get("prefix_injection") or current_injection.get()
        arguments = {"query": query, "key": key, "value": value, "attention_mask": mask, **kwargs}
        if injection is not None and injection.packing is None and injection.layer_of.get(module, ("",))[0] == site:
            change(arguments)
        return attend(module, **arguments)

    return patched


def drop_prefix(arguments: dict[str, Any]) -> None:
    injection = arguments.get("prefix_injection")
    if injection is None or injection.recorded_kv is None:
        arguments["prefix_injection"] = Injection({})


def see_everything(arguments: dict[str, Any]) -> None:
    arguments["attention_mask"] = torch.ones(
        1, 1, arguments["query"].shape[2], arguments["key"].shape[2], dtype=torch.bool
    )
