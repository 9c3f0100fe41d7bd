"""A backbone run with prefixes and a cache: one pass over a filled cache, and generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prefixtune.attention.cache import cache_argument, prefilled_cache
from prefixtune.attention.masks import cached_prefix_slots
from prefixtune.backbone.backbone import Backbone
from prefixtune.doctor.reference import NEW_TOKENS, Text, pad_rows
from prefixtune.errors import BackboneError
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate_ids
from prefixtune.prefix.prefix import Prefix

__all__ = ["DecodeTrace", "decode", "prefilled_logits"]


def prefilled_logits(backbone: Backbone, rows: Sequence[Text], prefixes: Sequence[Prefix | None]) -> list[Tensor]:
    """Each row's logits at real positions, (T, V), in a left-padded batch whose cache holds the prefixes."""
    cache, slots = prefilled_cache(backbone.model, backbone.layout, prefixes)
    ids, mask = pad_rows([row.ids for row in rows], "left", 0, backbone.device)
    cache_mask = torch.cat([slots.long(), mask], dim=1)
    positions = (cache_mask.cumsum(1) - 1).clamp(min=0)[:, slots.shape[1] :]
    arguments = {cache_argument(backbone.model): cache}
    with cached_prefix_slots(slots.shape[1]):
        output = backbone.model(
            input_ids=ids, attention_mask=cache_mask, position_ids=positions, use_cache=True, **arguments
        )
    return [row[real.bool()] for row, real in zip(output.logits, mask, strict=True)]


@dataclass
class DecodeTrace:
    """What `generate_ids` did.

    Attributes:
        tokens: The tokens that each row got.
        logits: Per step, the model's own logits at each row's last position, (B, V).
        widths: Per step, how many positions were computed.
    """

    tokens: list[list[int]]
    logits: list[Tensor] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)


def decode(backbone: Backbone, prompts: Sequence[Sequence[int]], prefixes: Sequence[Prefix | None]) -> DecodeTrace:
    """Generate in one batch, and trace the model's steps; prompts must be sorted by length, as the batch will be.

    Raises:
        BackboneError: Another number of tokens was generated than requested.
    """
    trace = DecodeTrace([])
    input_name = "decoder_input_ids" if backbone.kind == "encoder-decoder" else "input_ids"

    def record(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        trace.logits.append(output.logits[:, -1].float())
        trace.widths.append(int(kwargs[input_name].shape[1]))

    config = GenerateConfig(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, batch_size=len(prompts))
    handle = backbone.model.register_forward_hook(record, with_kwargs=True)
    try:
        trace.tokens = generate_ids(backbone, prompts, prefixes, config=config)
    finally:
        handle.remove()
    if any(len(tokens) != NEW_TOKENS for tokens in trace.tokens):
        counts = [len(tokens) for tokens in trace.tokens]
        raise BackboneError(f"{NEW_TOKENS} tokens were requested per row, but {counts} were generated.")
    return trace
