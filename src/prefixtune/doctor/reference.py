"""Run a backbone with prefixes in every way there is, and tell how far apart two outcomes are: the doctor's hands.

The plainest way is `outputs` on a single row: unpadded, computed in full, no cache. Everything else is compared with
it. Knows nothing of what should hold.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prefixtune.attention.cache import cache_argument, prefilled_cache
from prefixtune.attention.registry import visible_slots
from prefixtune.backbone.backbone import Backbone
from prefixtune.errors import BackboneError
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate_ids
from prefixtune.prefix.geometry import Site
from prefixtune.prefix.prefix import Prefix

__all__ = [
    "NEW_TOKENS",
    "Decoded",
    "Text",
    "allowed",
    "alone",
    "attended",
    "continued",
    "decode",
    "distance",
    "only",
    "outputs",
    "prefilled",
    "prefix_gradients",
    "recomputed",
    "replaced",
    "search",
    "strengthened",
]


NEW_TOKENS = 5
"""Tokens that `decode` and `search` generate."""

_TINY = 1e-30


def distance(ones: Sequence[Tensor], references: Sequence[Tensor], dtype: torch.dtype) -> float:
    """How far apart lists of tensors are, relative to the references; infinite where one is not finite.

    In float32 by the single largest difference of each pair; in half precision by the root mean square over all pairs,
    since there a few numbers stray far by rounding alone.
    """
    pairs = [(one.detach().float(), other.detach().float()) for one, other in zip(ones, references, strict=True)]
    if any(a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()) for a, b in pairs):
        return float("inf")
    if dtype in (torch.bfloat16, torch.float16):
        difference = sum(float((a - b).square().sum()) for a, b in pairs)
        return math.sqrt(difference / max(sum(float(b.square().sum()) for _, b in pairs), _TINY))
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=_TINY)) for a, b in pairs)


# --- prefixes --------------------------------------------------------------------------------------------------------


def strengthened(prefix: Prefix, strength: float) -> Prefix:
    """A prefix with its values multiplied."""
    return Prefix({site: tuple((k, v * strength) for k, v in layers) for site, layers in prefix.layers.items()})


def replaced(prefix: Prefix, other: Prefix, site: Site, number: int) -> Prefix:
    """A prefix with one layer of another."""
    layers = list(prefix.layers[site])
    layers[number] = other.layers[site][number]
    return Prefix({**prefix.layers, site: tuple(layers)})


def only(prefix: Prefix, site: Site) -> Prefix:
    """A prefix at one of its sites alone."""
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


def outputs(
    backbone: Backbone,
    rows: Sequence[Text],
    prefixes: Sequence[Prefix | None],
    *,
    side: str = "right",
    extra: int = 0,
) -> list[Tensor]:
    """Each row's logits (or an encoder's hidden states) at real positions, (T, V); a single row comes without a mask.

    Args:
        backbone: The backbone.
        rows: The texts.
        prefixes: One per row.
        side: Where padding is; an encoder-decoder's decoder is padded on the right.
        extra: Positions of padding that even the longest row gets.
    """
    device = backbone.device
    ids, mask = _padded([row.ids for row in rows], side, extra, device)
    shown = mask
    arguments: dict[str, Tensor] = {} if len(rows) == 1 and not extra else {"attention_mask": mask}
    if backbone.kind == "encoder-decoder":
        targets, shown = _padded([row.target for row in rows], "right", extra, device)
        arguments |= {"decoder_attention_mask": shown} if arguments else {}
        arguments["decoder_input_ids"] = targets
    if backbone.kind == "encoder":
        whole = backbone.hidden_states(ids, prefixes=list(prefixes), **arguments)
    else:
        whole = backbone.forward(ids, prefixes=list(prefixes), **arguments).logits
    return [row[real.bool()] for row, real in zip(whole, shown, strict=True)]


def attended(
    backbone: Backbone, rows: Sequence[Text], prefixes: Sequence[Prefix | None]
) -> dict[tuple[Site, int], Tensor]:
    """What each attention layer gives for the first row, (T, E): by site and number, at its first call."""
    found: dict[tuple[Site, int], Tensor] = {}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        given = output[0] if isinstance(output, tuple) else output
        found.setdefault(backbone.layout.layer_of[module], given[0].detach())

    with contextlib.ExitStack() as stack:
        for module in backbone.layout.layer_of:
            stack.callback(module.register_forward_hook(keep).remove)
        outputs(backbone, rows, prefixes)
    return found


def alone(backbone: Backbone, rows: Sequence[Text], prefixes: Sequence[Prefix | None]) -> list[Tensor]:
    """`outputs`, one row at a time."""
    return [outputs(backbone, [row], [prefix])[0] for row, prefix in zip(rows, prefixes, strict=True)]


def prefix_gradients(
    backbone: Backbone, rows: Sequence[Text], prefixes: Sequence[Prefix]
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of a padded batch, and what a random weighting of them gives every key and value as gradient."""
    leaves = [prefix.to(backbone.dtype).leaves() for prefix in prefixes]
    generator = torch.Generator().manual_seed(1)
    with torch.enable_grad():
        found = outputs(backbone, rows, leaves)
        weighted = [(one.float() * torch.randn(one.shape, generator=generator).to(one.device)).sum() for one in found]
        tensors = [tensor for leaf in leaves for tensor in leaf.tensors()]
        loss = torch.stack(weighted).sum()
        # Where no prefix takes part, there is nothing to derive.
        made = (
            torch.autograd.grad(loss, tensors, materialize_grads=True)
            if loss.requires_grad
            else [torch.zeros_like(tensor) for tensor in tensors]
        )
    return [one.detach() for one in found], list(made)


def _padded(rows: Sequence[Sequence[int]], side: str, extra: int, device: Any) -> tuple[Tensor, Tensor]:
    """Ids and mask; the padding is of ids that would matter, were they seen."""
    longest = max(map(len, rows)) + extra
    ids, mask = [], []
    for row in rows:
        missing = longest - len(row)
        padding, hidden, real = [row[0]] * missing, [0] * missing, [1] * len(row)
        ids.append([*padding, *row] if side == "left" else [*row, *padding])
        mask.append(hidden + real if side == "left" else real + hidden)
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


# --- with a cache ----------------------------------------------------------------------------------------------------


def prefilled(backbone: Backbone, rows: Sequence[Text], prefixes: Sequence[Prefix | None]) -> list[Tensor]:
    """Each row's logits by the prefilled route, left-padded, (T, V) at real positions."""
    cache, slots = prefilled_cache(backbone.model, backbone.layout, prefixes)
    ids, mask = _padded([row.ids for row in rows], "left", 0, backbone.device)
    whole = torch.cat([slots.long(), mask], dim=1)
    positions = (whole.cumsum(1) - 1).clamp(min=0)[:, slots.shape[1] :]
    arguments = {cache_argument(backbone.model): cache}
    with visible_slots(slots.shape[1]):
        output = backbone.model(
            input_ids=ids, attention_mask=whole, position_ids=positions, use_cache=True, **arguments
        )
    return [row[real.bool()] for row, real in zip(output.logits, mask, strict=True)]


@dataclass
class Decoded:
    """What `generate_ids` did.

    Attributes:
        tokens: Per row, what was generated.
        logits: Per step, the model's own at each row's last position, (B, V).
        widths: Per step, how many positions were computed.
    """

    tokens: list[list[int]]
    logits: list[Tensor] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)


def decode(
    backbone: Backbone, prompts: Sequence[Sequence[int]], prefixes: Sequence[Prefix | None], num_beams: int = 1
) -> Decoded:
    """Generate in one batch, watching the model; prompts must be sorted by length, as the batch will be.

    Raises:
        BackboneError: Another number of tokens was generated than asked for.
    """
    seen = Decoded([])
    read = "decoder_input_ids" if backbone.kind == "encoder-decoder" else "input_ids"

    def watch(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        seen.logits.append(output.logits[:, -1].float())
        seen.widths.append(int(kwargs[read].shape[1]))

    config = GenerateConfig(
        max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, num_beams=num_beams, batch_size=len(prompts)
    )
    hook = backbone.model.register_forward_hook(watch, with_kwargs=True)
    try:
        seen.tokens = generate_ids(backbone, prompts, prefixes, config=config)
    finally:
        hook.remove()
    if any(len(tokens) != NEW_TOKENS for tokens in seen.tokens):
        counts = [len(tokens) for tokens in seen.tokens]
        raise BackboneError(f"asked for {NEW_TOKENS} tokens, but {counts} were generated.")
    return seen


# --- decoding without a cache ----------------------------------------------------------------------------------------


def continued(backbone: Backbone, prompt: Sequence[int], tokens: Sequence[int]) -> Text:
    """What is read once these tokens have been generated."""
    if backbone.kind == "encoder-decoder":
        return Text(list(prompt), [backbone.decoder_start_id, *tokens])
    return Text([*prompt, *tokens])


def recomputed(backbone: Backbone, prompt: Sequence[int], tokens: Sequence[int], prefix: Prefix | None) -> Tensor:
    """Logits that choose each of `tokens`, computed in full, (N, V)."""
    text = continued(backbone, prompt, tokens[:-1])
    return outputs(backbone, [text], [prefix])[0][-len(tokens) :].float()


def allowed(backbone: Backbone, scores: Tensor, step: int = 0) -> Tensor:
    """Scores as `decode` sees them, (N, V) for the steps from `step` on.

    Without the end token, which is barred until all tokens are there; and with the first token that some
    encoder-decoders force (mBART, some BARTs).
    """
    scores = scores.clone()
    scores[:, backbone.eos_id] = float("-inf")
    if step == 0 and backbone.forced_bos_id is not None:
        scores[0] = float("-inf")
        scores[0, backbone.forced_bos_id] = 0
    return scores


def search(backbone: Backbone, prompt: Sequence[int], prefix: Prefix | None, num_beams: int) -> tuple[list[int], float]:
    """Beam search: the best beam, and its mean log-probability."""
    beams: list[list[int]] = [[]]
    sums = torch.zeros(1, device=backbone.device)
    for step in range(NEW_TOKENS):
        rows = [continued(backbone, prompt, beam) for beam in beams]
        logits = torch.stack([one[-1] for one in outputs(backbone, rows, [prefix] * len(rows))]).float()
        total = sums[:, None] + allowed(backbone, logits.log_softmax(-1), step)
        sums, places = total.flatten().topk(num_beams)
        beams = [[*beams[place // total.shape[1]], place % total.shape[1]] for place in places.tolist()]
    return beams[0], float(sums[0]) / NEW_TOKENS
