"""A quick look at whether prefixes work on a model that is loaded: two rows, a prefix of two positions.

What generation computes by steps with a cache, in a padded batch, is compared with the same rows computed alone and in
full; an encoder's padded batch with its rows alone. It costs about six calls of the model. A type of model is checked
once, and that it passed is remembered in the cache folder, by everything that matters.

`PREFIXTUNE_SELF_CHECK=0` turns it off.

`prefixtune doctor` looks more closely.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefixtune.attention.cache import cache_argument, prefilled_cache
from prefixtune.attention.compute import add_noise, prefix_from_tokens
from prefixtune.attention.forward import forward_with_prefixes
from prefixtune.attention.injection import batch_prefixes, injecting
from prefixtune.attention.layout import Layout, main_device
from prefixtune.attention.masks import cached_prefix_slots
from prefixtune.errors import BackboneError, PrefixError, first_line
from prefixtune.prefix.prefix import Prefix
from prefixtune.utils.files import write_text
from prefixtune.utils.folders import cache_folder

__all__ = ["SWITCH", "Comparison", "check_once", "compare"]


SWITCH = "PREFIXTUNE_SELF_CHECK"
"""The environment variable that turns the check off where it is 0."""

_PREFIX_LENGTH, _NEW_TOKENS = 2, 3
_TEXT_LENGTHS = (3, 5)
_BOUNDS = {torch.bfloat16: 0.1, torch.float16: 0.1}
"""Half-precision dtype -> how far apart two ways of computing may be. Rounding may send a token to another expert."""
_FLOAT32_BOUND = 0.01


@dataclass(frozen=True)
class Comparison:
    """Two ways of computing the same rows.

    Attributes:
        difference: How far apart they are, relative to the numbers themselves.
        bound: How far apart they may be.
        effect: What the prefix changes, in the same measure.
        differentiable: Whether a gradient reaches the prefix in every layer.
    """

    difference: float
    bound: float
    effect: float
    differentiable: bool

    @property
    def passed(self) -> bool:
        """Whether they agree, and the prefix has an effect and can be trained."""
        return self.difference <= self.bound and 0 < self.effect < float("inf") and self.differentiable


def check_once(model: Any, layout: Layout, attention: str) -> None:
    """Check a model of a type that was not checked before, unless that is turned off; remember that it passed.

    Args:
        model: The frozen model, probed before.
        layout: What `probe` found.
        attention: What computes the attention.

    Raises:
        BackboneError: Prefixes do not work on it; the message says what differs.
    """
    facts = _architecture_facts(model, attention)
    if os.environ.get(SWITCH) == "0":
        return
    note = cache_folder() / "checked" / f"{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()}.json"
    if note.is_file():
        return
    name = f"{type(model).__name__} (model type {facts['model_type']!r})"
    hint = f"choose another backbone, or set {SWITCH}=0 and see what `prefixtune doctor` says."
    try:
        found = compare(model, layout)
    except PrefixError:
        raise
    except Exception as error:
        raise BackboneError(f"{name} cannot run with a prefix: {first_line(error)}", hint=hint) from error
    if not found.passed:
        what = (
            f"with a prefix, {'a padded batch' if layout.kind == 'encoder' else 'cached decoding in a padded batch'} "
            f"differs from one row computed in full by {found.difference:.1e} (at most {found.bound:g})"
        )
        if found.difference <= found.bound:
            what = f"a prefix changes its outputs by {found.effect:.1e}"
            what += "" if found.differentiable else ", and no gradient reaches it in some layer"
        raise BackboneError(f"{name} does not carry prefixes correctly: {what}.", hint=hint)
    _remember(note, facts)


def _architecture_facts(model: Any, attention: str) -> dict[str, str]:
    """Everything but the weights that a model's behaviour with prefixes depends on."""
    config = model.config.to_dict()
    for name in ("_name_or_path", "name_or_path", "transformers_version", "architectures"):
        config.pop(name, None)
    return {
        "model_type": str(getattr(model.config, "model_type", "?")),
        "model_class": type(model).__name__,
        "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        "attention": attention,
        "dtype": str(model.dtype),
        "device": main_device(model).type,
        **{name: importlib.metadata.version(name) for name in ("transformers", "torch", "prefixtune")},
    }


def _remember(note: Path, facts: dict[str, str]) -> None:
    # Where the folder cannot be written, the check runs each time.
    with contextlib.suppress(PrefixError, OSError):
        write_text(note, json.dumps(facts, indent=1) + "\n")


# --- the comparison --------------------------------------------------------------------------------------------------


@torch.no_grad()
def compare(model: Any, layout: Layout) -> Comparison:
    """Compare the ways in which a model is used with a prefix."""
    generator = torch.Generator().manual_seed(0)
    size = model.get_input_embeddings().weight.shape[0]
    device = main_device(model)

    def draw(length: int) -> list[int]:
        ids: list[int] = torch.randint(size, (length,), generator=generator).tolist()
        return ids

    prefix = prefix_from_tokens(model, layout, torch.tensor([draw(_PREFIX_LENGTH)], device=device))
    prefix = add_noise(prefix, generator)
    prefixes = [prefix, None]
    texts = [draw(length) for length in _TEXT_LENGTHS]
    targets = [draw(_NEW_TOKENS) for _ in texts]
    alone = [_alone(model, layout, *row) for row in zip(texts, targets, prefixes, strict=True)]
    bare = _alone(model, layout, texts[0], targets[0], None)
    ways = {"encoder": _padded, "encoder-decoder": _decoded_beside, "decoder": _decoded}
    batched = ways[layout.kind](model, layout, texts, targets, prefixes)
    difference = max(_distance(one, other) for one, other in zip(batched, alone, strict=True))
    bound = _BOUNDS.get(model.dtype, _FLOAT32_BOUND)
    learns = _is_differentiable(model, layout, texts[0], targets[0], prefix)
    return Comparison(difference, bound, _distance(alone[0], bare), learns)


def _is_differentiable(model: Any, layout: Layout, text: Sequence[int], target: Sequence[int], prefix: Prefix) -> bool:
    """Whether every layer's values of a prefix get a gradient from a row's outputs."""
    leaf = prefix.to(model.dtype).leaves()
    values = [value for layers in leaf.layers.values() for _, value in layers]
    with torch.enable_grad():
        outputs = _alone(model, layout, text, target, leaf).float()
        if not outputs.requires_grad:
            return False
        # A plain sum of normed numbers may hardly depend on them.
        weights = torch.linspace(-1, 1, outputs.numel(), device=outputs.device).reshape(outputs.shape)
        gradients = torch.autograd.grad((outputs * weights).sum(), values, materialize_grads=True)
    return all(bool(one.isfinite().all()) and bool((one != 0).any()) for one in gradients)


def _distance(one: Tensor, reference: Tensor) -> float:
    one, reference = one.float(), reference.float()
    if one.shape != reference.shape or not bool(one.isfinite().all() and reference.isfinite().all()):
        return float("inf")
    return float((one - reference).norm() / reference.norm().clamp(min=1e-30))


def _pad(model: Any, rows: Sequence[Sequence[int]], side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask of a padded batch."""
    pad = getattr(model.config.get_text_config(decoder=True), "pad_token_id", None) or 0
    longest, device = max(map(len, rows)), main_device(model)
    ids, mask = [], []
    for row in rows:
        padding, hidden, real = [pad] * (longest - len(row)), [0] * (longest - len(row)), [1] * len(row)
        ids.append([*padding, *row] if side == "left" else [*row, *padding])
        mask.append(hidden + real if side == "left" else real + hidden)
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _alone(model: Any, layout: Layout, text: Sequence[int], target: Sequence[int], prefix: Prefix | None) -> Tensor:
    """A row's outputs, computed in full: of the last text position and the target's, or of an encoder's text."""
    device = main_device(model)
    ids, new = torch.tensor([text], device=device), torch.tensor([target], device=device)
    if layout.kind == "encoder":
        return _hidden(model, layout, ids, None, [prefix])[0]
    if layout.kind == "encoder-decoder":
        output: Tensor = forward_with_prefixes(model, layout, ids, prefixes=[prefix], decoder_input_ids=new).logits[0]
        return output
    logits: Tensor = forward_with_prefixes(model, layout, torch.cat([ids, new], dim=1), prefixes=[prefix]).logits[0]
    return logits[len(text) - 1 :]


def _hidden(model: Any, layout: Layout, ids: Tensor, mask: Tensor | None, prefixes: Sequence[Prefix | None]) -> Tensor:
    hidden: Tensor = forward_with_prefixes(model.base_model, layout, ids, mask, prefixes=prefixes)[0]
    return hidden


def _padded(
    model: Any,
    layout: Layout,
    texts: Sequence[list[int]],
    targets: Sequence[list[int]],
    prefixes: Sequence[Prefix | None],
) -> list[Tensor]:
    """An encoder's padded batch."""
    ids, mask = _pad(model, texts, "right")
    whole = _hidden(model, layout, ids, mask, prefixes)
    return [row[real.bool()] for row, real in zip(whole, mask, strict=True)]


def _decoded(
    model: Any,
    layout: Layout,
    texts: Sequence[list[int]],
    targets: Sequence[list[int]],
    prefixes: Sequence[Prefix | None],
) -> list[Tensor]:
    """A decoder-only model's steps with a cache, along given tokens, by the route that generation takes."""
    ids, mask = _pad(model, texts, "left")
    shift = torch.tensor([[0 if prefix is None else prefix.length()] for prefix in prefixes], device=ids.device)
    given: dict[str, Any] = {"use_cache": True}
    ours: contextlib.AbstractContextManager[None] = injecting(batch_prefixes(prefixes, layout, model.dtype, ids.device))
    if layout.cache_layers is not None:
        cache, slots = prefilled_cache(model, layout, prefixes)
        given[cache_argument(model)], ours = cache, cached_prefix_slots(slots.shape[1])
        shown = torch.cat([slots.long(), mask], dim=1)
    else:
        shown = mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0) + shift
    steps = []
    new = torch.tensor(targets, device=ids.device)
    with ours:
        for number in range(_NEW_TOKENS + 1):
            output = model(input_ids=ids, attention_mask=shown, position_ids=positions, **given)
            steps.append(output.logits[:, -1])
            if number < _NEW_TOKENS:
                given[cache_argument(model)] = output[cache_argument(model)]
                ids, positions = new[:, number : number + 1], positions[:, -1:] + 1
                shown = torch.cat([shown, torch.ones_like(ids)], dim=1)
    return list(torch.stack(steps, dim=1))


def _decoded_beside(
    model: Any,
    layout: Layout,
    texts: Sequence[list[int]],
    targets: Sequence[list[int]],
    prefixes: Sequence[Prefix | None],
) -> list[Tensor]:
    """An encoder-decoder's steps with a cache, along given tokens."""
    from transformers import DynamicCache, EncoderDecoderCache

    ids, mask = _pad(model, texts, "right")
    new = torch.tensor(targets, device=ids.device)
    name, steps = cache_argument(model), []
    cache: Any = EncoderDecoderCache(DynamicCache(), DynamicCache())
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": True}
    with injecting(batch_prefixes(prefixes, layout, model.dtype, ids.device)):
        # What an encoder makes of its text is computed once, as generation does.
        given["encoder_outputs"] = model.get_encoder()(input_ids=ids, attention_mask=mask, return_dict=True)
        del given["input_ids"]
        for number in range(_NEW_TOKENS):
            output = model(**given, decoder_input_ids=new[:, number : number + 1], **{name: cache})
            cache = output[name]
            steps.append(output.logits[:, -1])
    return list(torch.stack(steps, dim=1))
