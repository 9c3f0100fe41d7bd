"""The reference: a backbone run with prefixes in the plainest way, and how far another result is from it.

The plainest way is `compute_outputs` on a single row: unpadded, computed in full, without a cache.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prefixtune.backbone.backbone import Backbone
from prefixtune.prefix.geometry import Site
from prefixtune.prefix.prefix import Prefix

__all__ = [
    "NEW_TOKENS",
    "Text",
    "append_tokens",
    "attention_outputs",
    "compute_outputs",
    "keep_site",
    "mask_scores",
    "outputs_one_by_one",
    "pad_rows",
    "prefix_gradients",
    "recompute_logits",
    "relative_difference",
    "replace_layer",
    "scale_values",
    "slot_gradients",
]


NEW_TOKENS = 5
"""Tokens that `decode` generates."""

_TINY = 1e-30


def relative_difference(tensors: Sequence[Tensor], references: Sequence[Tensor], dtype: torch.dtype) -> float:
    """How far tensors are from their references, relative to these; infinite where a number is not finite.

    In float32 by the largest difference in each pair; in half precision by the root mean square over all pairs, because
    there rounding alone moves a few numbers far.
    """
    pairs = [(a.detach().float(), b.detach().float()) for a, b in zip(tensors, references, strict=True)]
    if any(a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()) for a, b in pairs):
        return float("inf")
    if dtype in (torch.bfloat16, torch.float16):
        squares = sum(float((a - b).square().sum()) for a, b in pairs)
        return math.sqrt(squares / max(sum(float(b.square().sum()) for _, b in pairs), _TINY))
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=_TINY)) for a, b in pairs)


# --- prefixes --------------------------------------------------------------------------------------------------------


def scale_values(prefix: Prefix, factor: float) -> Prefix:
    """A prefix with its values multiplied."""
    return Prefix({site: tuple((k, v * factor) for k, v in layers) for site, layers in prefix.layers.items()})


def replace_layer(prefix: Prefix, other: Prefix, site: Site, index: int) -> Prefix:
    """A prefix with one layer of another prefix."""
    layers = list(prefix.layers[site])
    layers[index] = other.layers[site][index]
    return Prefix({**prefix.layers, site: tuple(layers)})


def keep_site(prefix: Prefix, site: Site) -> Prefix:
    """A prefix reduced to one of its sites."""
    return Prefix({site: prefix.layers[site]})


# --- computed in full ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """What a model reads in one row.

    Attributes:
        ids: The text; for an encoder-decoder, what its encoder reads.
        target: What an encoder-decoder's decoder reads; else empty.
    """

    ids: list[int]
    target: list[int] = field(default_factory=list)


def compute_outputs(
    backbone: Backbone,
    rows: Sequence[Text],
    prefixes: Sequence[Prefix | None],
    *,
    side: str = "right",
    extra: int = 0,
) -> list[Tensor]:
    """Each row's logits at real positions, (T, V); of an encoder, its hidden states. A single row gets no mask.

    Args:
        backbone: The backbone.
        rows: The texts.
        prefixes: One per row.
        side: Where rows are padded; an encoder-decoder's decoder is always padded on the right.
        extra: Padding of the longest row.
    """
    device = backbone.device
    ids, mask = pad_rows([row.ids for row in rows], side, extra, device)
    output_mask = mask
    arguments: dict[str, Tensor] = {} if len(rows) == 1 and not extra else {"attention_mask": mask}
    if backbone.kind == "encoder-decoder":
        targets, output_mask = pad_rows([row.target for row in rows], "right", extra, device)
        arguments |= {"decoder_attention_mask": output_mask} if arguments else {}
        arguments["decoder_input_ids"] = targets
    if backbone.kind == "encoder":
        outputs = backbone.hidden_states(ids, prefixes=list(prefixes), **arguments)
    else:
        outputs = backbone.forward(ids, prefixes=list(prefixes), **arguments).logits
    return [row[real.bool()] for row, real in zip(outputs, output_mask, strict=True)]


def attention_outputs(
    backbone: Backbone, rows: Sequence[Text], prefixes: Sequence[Prefix | None]
) -> dict[tuple[Site, int], Tensor]:
    """Each attention layer's output for the first row, (T, E), at its first call; by site and index."""
    outputs: dict[tuple[Site, int], Tensor] = {}

    def record(module: nn.Module, args: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        outputs.setdefault(backbone.layout.layer_of[module], tensor[0].detach())

    with contextlib.ExitStack() as stack:
        for module in backbone.layout.layer_of:
            stack.callback(module.register_forward_hook(record).remove)
        compute_outputs(backbone, rows, prefixes)
    return outputs


def outputs_one_by_one(backbone: Backbone, rows: Sequence[Text], prefixes: Sequence[Prefix | None]) -> list[Tensor]:
    """`compute_outputs`, one row at a time."""
    return [compute_outputs(backbone, [row], [prefix])[0] for row, prefix in zip(rows, prefixes, strict=True)]


def prefix_gradients(
    backbone: Backbone, rows: Sequence[Text], prefixes: Sequence[Prefix]
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of a padded batch, and the gradients of their randomly weighted sum by every key and value."""
    leaves = [prefix.to(backbone.dtype).leaves() for prefix in prefixes]
    generator = torch.Generator().manual_seed(1)
    with torch.enable_grad():
        outputs = compute_outputs(backbone, rows, leaves)
        weighted = [(row.float() * torch.randn(row.shape, generator=generator).to(row.device)).sum() for row in outputs]
        tensors = [tensor for leaf in leaves for tensor in leaf.tensors()]
        loss = torch.stack(weighted).sum()
        # Without any prefix in the graph there is nothing to differentiate.
        gradients = (
            torch.autograd.grad(loss, tensors, materialize_grads=True)
            if loss.requires_grad
            else [torch.zeros_like(tensor) for tensor in tensors]
        )
    return [row.detach() for row in outputs], list(gradients)


def slot_gradients(gradients: Sequence[Tensor]) -> Tensor:
    """The largest gradient of every key and value slot of all layers."""
    return torch.cat([gradient.float().abs().amax(dim=(0, 2)) for gradient in gradients])


def pad_rows(rows: Sequence[Sequence[int]], side: str, extra: int, device: Any) -> tuple[Tensor, Tensor]:
    """Ids and mask; padding repeats the first id, so that a model that sees padding gives other outputs."""
    longest = max(map(len, rows)) + extra
    ids, mask = [], []
    for row in rows:
        missing = longest - len(row)
        padding, hidden, real = [row[0]] * missing, [0] * missing, [1] * len(row)
        ids.append([*padding, *row] if side == "left" else [*row, *padding])
        mask.append(hidden + real if side == "left" else real + hidden)
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


# --- decoding without a cache ----------------------------------------------------------------------------------------


def append_tokens(backbone: Backbone, prompt: Sequence[int], tokens: Sequence[int]) -> Text:
    """What the model reads once these tokens have been generated."""
    if backbone.kind == "encoder-decoder":
        return Text(list(prompt), [backbone.decoder_start_id, *tokens])
    return Text([*prompt, *tokens])


def recompute_logits(backbone: Backbone, prompt: Sequence[int], tokens: Sequence[int], prefix: Prefix | None) -> Tensor:
    """The logits that each of `tokens` is chosen from, computed in full, (N, V)."""
    text = append_tokens(backbone, prompt, tokens[:-1])
    return compute_outputs(backbone, [text], [prefix])[0][-len(tokens) :].float()


def mask_scores(backbone: Backbone, scores: Tensor, step: int = 0) -> Tensor:
    """Scores as generation masks them, (N, V), for the steps from `step` on.

    The end token is excluded until all tokens are generated, and some encoder-decoders force the first token (mBART,
    some BARTs).
    """
    scores = scores.clone()
    scores[:, backbone.eos_id] = float("-inf")
    if step == 0 and backbone.forced_bos_id is not None:
        scores[0] = float("-inf")
        scores[0, backbone.forced_bos_id] = 0
    return scores
