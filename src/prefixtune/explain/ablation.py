"""The loss with parts of a prefix left out: each position, each layer, keys or values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from prefixtune.explain.controls import with_layers
from prefixtune.explain.losses import RowLosses, change, row_losses
from prefixtune.explain.subject import Subject, blocks
from prefixtune.explain.view import View
from prefixtune.prefix.geometry import Site
from prefixtune.prefix.prefix import Prefix

__all__ = ["loss_view", "without_positions"]


_CONTROL_PARTS = 6
"""Of a random prefix, so many positions and layers are left out too."""


def loss_view(subject: Subject) -> View:
    """Losses of the whole prefix, of its controls, and with parts left out."""
    if not subject.tokenized:
        return View("loss", left_out="there is no data to compute a loss on; give --data.")
    seed, most = subject.limits.seed, subject.limits.parts
    whole = row_losses(subject, subject.prefix)
    bare = row_losses(subject, None)
    numbers: dict[str, Any] = {
        "rows": len(subject.tokenized),
        "labels": sum(whole.counts),
        "whole": whole.describe(seed),
        "without_prefix": {**bare.describe(seed), **change(bare, whole, seed)},
        "controls": {},
    }
    notes: list[str] = []
    for name in subject.timed(list(subject.controls)):
        losses = row_losses(subject, subject.controls[name])
        numbers["controls"][name] = {**losses.describe(seed), **change(losses, whole, seed)}
    for name, part in (("keys", 0), ("values", 1)):
        for _ in subject.timed([part]):
            losses = row_losses(subject, _averaged(subject.prefix, part=part))
            numbers[name] = change(losses, whole, seed)
    positions = _position_parts(subject, notes)
    numbers["positions"] = _sweep(subject, whole, positions, _position_losses, subject.prefix)
    layers = _layer_parts(subject, most)
    numbers["layers"] = _sweep(subject, whole, layers, _layer_losses, subject.prefix)
    if "random" in subject.controls:
        random = subject.controls["random"]
        random_whole = row_losses(subject, random)
        parts = [(_spread(positions), _position_losses), (_spread(layers), _layer_losses)]
        swept = [_sweep(subject, random_whole, chosen, compute, random) for chosen, compute in parts]
        numbers["random_parts"] = {"positions": swept[0], "layers": swept[1]}
    missing = len(positions) + len(layers) - len(numbers["positions"]) - len(numbers["layers"])
    if missing:
        notes.append(f"{missing} parts are not computed: the time is over (--minutes).")
    return View("loss", numbers, tuple(notes))


def _spread(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Some of the parts, evenly spread."""
    count = min(_CONTROL_PARTS, len(parts))
    return [parts[index * len(parts) // count] for index in range(count)]


def _sweep(
    subject: Subject,
    whole: RowLosses,
    parts: Sequence[dict[str, Any]],
    compute: Callable[[Subject, Prefix, dict[str, Any]], RowLosses],
    prefix: Prefix,
) -> list[dict[str, Any]]:
    """The change of the loss as each part alone is left out, until the time is over."""
    seed = subject.limits.seed
    return [{**part, **change(compute(subject, prefix, part), whole, seed)} for part in subject.timed(parts)]


# --- positions --------------------------------------------------------------------------------------------------------


def _position_parts(subject: Subject, notes: list[str]) -> list[dict[str, Any]]:
    """The blocks of positions that are left out."""
    count = subject.prefix.prefix_length
    if count < 2:
        notes.append("The prefix has one position: without it is without the prefix.")
        return []
    return [{"first": block[0], "last": block[-1]} for block in blocks(count, subject.limits.parts)]


def _position_losses(subject: Subject, prefix: Prefix, part: dict[str, Any]) -> RowLosses:
    return without_positions(subject, prefix, range(part["first"], part["last"] + 1))


def without_positions(subject: Subject, prefix: Prefix, positions: range) -> RowLosses:
    """Losses where some positions of a prefix are not seen, and all others stand where they stood.

    In a decoder-only model they are hidden by a mask, since without them the text would move; elsewhere a prefix
    moves no text, so that they are taken away.
    """
    if subject.backbone.kind == "decoder":
        return row_losses(subject, prefix, hidden=positions)
    kept: dict[Site, tuple[tuple[Tensor, Tensor], ...]] = {}
    for site, layers in prefix.layers.items():
        index = torch.tensor([p for p in range(prefix.length(site)) if p not in positions], dtype=torch.long)
        if len(index):
            kept[site] = tuple((key[:, index], value[:, index]) for key, value in layers)
    return row_losses(subject, Prefix(kept, prefix.header, prefix.head) if kept else None)


# --- layers, keys and values ------------------------------------------------------------------------------------------


def _layer_parts(subject: Subject, most: int) -> list[dict[str, Any]]:
    """The blocks of layers that are replaced, at each site."""
    counts = {site: len(layers) for site, layers in subject.prefix.layers.items()}
    each = max(1, most // len(counts))
    return [
        {"site": site, "first": block[0], "last": block[-1]}
        for site, count in counts.items()
        for block in blocks(count, each)
    ]


def _layer_losses(subject: Subject, prefix: Prefix, part: dict[str, Any]) -> RowLosses:
    layers = range(part["first"], part["last"] + 1)
    return row_losses(subject, _averaged(prefix, site=part["site"], layers=layers))


def _averaged(
    prefix: Prefix, *, site: Site | None = None, layers: range | None = None, part: int | None = None
) -> Prefix:
    """A prefix some of whose keys and values are their mean over its positions.

    Args:
        prefix: The prefix.
        site: Only there; None: at all.
        layers: Only these; None: all.
        part: 0: only keys; 1: only values; None: both.
    """
    source = with_layers(prefix, _mean_over_positions)
    replaced: dict[Site, tuple[tuple[Tensor, Tensor], ...]] = {}
    for at, pairs in prefix.layers.items():
        chosen = [(site is None or at == site) and (layers is None or index in layers) for index in range(len(pairs))]
        replaced[at] = tuple(
            (new[0] if is_chosen and part != 1 else old[0], new[1] if is_chosen and part != 0 else old[1])
            for old, new, is_chosen in zip(pairs, source.layers[at], chosen, strict=True)
        )
    return Prefix(replaced, prefix.header, prefix.head)


def _mean_over_positions(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return key.mean(1, keepdim=True).expand_as(key), value.mean(1, keepdim=True).expand_as(value)
