"""The loss with parts of a prefix left out: each position, each layer, keys or values; with intervals over the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefixtune.data.encoding import TokenizedExample
from prefixtune.evaluation.metrics.base import ItemStatistics
from prefixtune.evaluation.metrics.significance import Measurement, bootstrap
from prefixtune.explain.controls import with_layers
from prefixtune.explain.subject import Subject, View, blocks
from prefixtune.prefix.geometry import Site
from prefixtune.prefix.prefix import Prefix
from prefixtune.training.score import score_targets

__all__ = ["RowLosses", "loss_view", "row_losses", "rows_of", "without_positions"]

_CONTROL_PARTS = 6
"""Of a random prefix, so many positions and layers are left out too."""
Part = dict[str, Any]


# --- losses of rows ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowLosses:
    """Per row, the sum of its labels' losses in nats, and how many labels it has; a text's windows are one row."""

    sums: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def mean(self) -> float:
        """The loss per label (per token, where targets are texts)."""
        return sum(self.sums) / sum(self.counts)

    def describe(self, seed: int) -> Part:
        """The loss per label, and its 95 % bootstrap interval over the rows."""
        return {"loss": self.mean, "interval": _interval(self.sums, self.counts, seed)}

    def change(self, whole: RowLosses, seed: int) -> Part:
        """How much larger the loss per label is than with the whole prefix, and the paired interval over the rows."""
        differences = [a - b for a, b in zip(self.sums, whole.sums, strict=True)]
        return {"change": self.mean - whole.mean, "interval": _interval(differences, whole.counts, seed)}


def _interval(sums: Sequence[float], counts: Sequence[int], seed: int) -> list[float] | None:
    if len(sums) < 2:
        return None
    values = np.array([sums, counts], dtype=float).T
    statistics = ItemStatistics(values, lambda total: float(total[0] / total[1]), "loss per label")
    return list(bootstrap(Measurement("loss", False, statistics, lambda items: statistics), seed=seed))


def row_losses(subject: Subject, prefix: Prefix | None, hidden: Sequence[int] = ()) -> RowLosses:
    """Each row's loss with a prefix in front (None: none), whose `hidden` positions are not seen (`Group.hidden`)."""
    losses = rows_of(subject, [replace(row, hidden=tuple(hidden)) for row in subject.tokenized], prefix)
    origins = subject.origins or range(len(losses.sums))
    sums, counts = dict.fromkeys(origins, 0.0), dict.fromkeys(origins, 0)
    for origin, one, count in zip(origins, losses.sums, losses.counts, strict=True):
        sums[origin] += one
        counts[origin] += count
    return RowLosses(tuple(sums.values()), tuple(counts.values()))


def rows_of(subject: Subject, rows: Sequence[TokenizedExample], prefix: Prefix | None) -> RowLosses:
    """Each row's loss; with a head, that of its labels."""
    found = score_targets(subject.backbone, prefix, rows, subject.limits.batch_size, head=subject.prefix.head)
    return RowLosses(tuple(found[:, 0].tolist()), tuple(map(int, found[:, 1].tolist())))


# --- the view ---------------------------------------------------------------------------------------------------------


def loss_view(subject: Subject) -> View:
    """Losses of the whole prefix, of its controls, and with parts left out."""
    if not subject.tokenized:
        return View("loss", left_out="there is no data to compute a loss on; give --data.")
    seed, prefix, notes = subject.limits.seed, subject.prefix, []
    whole, bare = row_losses(subject, prefix), row_losses(subject, None)
    numbers: dict[str, Any] = {
        "rows": len(subject.tokenized),
        "labels": sum(whole.counts),
        "whole": whole.describe(seed),
        "without_prefix": {**bare.describe(seed), **bare.change(whole, seed)},
        "controls": {},
    }
    for name in subject.timed(list(subject.controls)):
        losses = row_losses(subject, subject.controls[name])
        numbers["controls"][name] = {**losses.describe(seed), **losses.change(whole, seed)}
    averaged = {
        "keys": with_layers(prefix, lambda key, value: (_mean(key), value)),
        "values": with_layers(prefix, lambda key, value: (key, _mean(value))),
    }
    for name in subject.timed(list(averaged)):
        numbers[name] = row_losses(subject, averaged[name]).change(whole, seed)
    positions = [_first_last(block) for block in blocks(prefix.prefix_length, subject.limits.parts)]
    if prefix.prefix_length < 2:
        notes.append("The prefix has one position: without it is without the prefix.")
        positions = []
    each = max(1, subject.limits.parts // len(prefix.layers))
    layers = [
        {"site": site, **_first_last(block)}
        for site, pairs in prefix.layers.items()
        for block in blocks(len(pairs), each)
    ]
    numbers["positions"] = _sweep(subject, prefix, whole, positions)
    numbers["layers"] = _sweep(subject, prefix, whole, layers)
    random = subject.controls["random"]
    random_whole = row_losses(subject, random)
    numbers["random_parts"] = {
        "positions": _sweep(subject, random, random_whole, _spread(positions)),
        "layers": _sweep(subject, random, random_whole, _spread(layers)),
    }
    if missing := len(positions) + len(layers) - len(numbers["positions"]) - len(numbers["layers"]):
        notes.append(f"{missing} parts are not computed: the time is over (--minutes).")
    return View("loss", numbers, tuple(notes))


def _first_last(block: range) -> Part:
    return {"first": block[0], "last": block[-1]}


def _spread(parts: Sequence[Part]) -> list[Part]:
    """Some of the parts, evenly spread."""
    count = min(_CONTROL_PARTS, len(parts))
    return [parts[index * len(parts) // count] for index in range(count)]


def _sweep(subject: Subject, prefix: Prefix, whole: RowLosses, parts: Sequence[Part]) -> list[Part]:
    """The change of the loss as each part alone is left out, until the time is over."""
    seed = subject.limits.seed
    return [{**part, **_without(subject, prefix, part).change(whole, seed)} for part in subject.timed(parts)]


def _without(subject: Subject, prefix: Prefix, part: Part) -> RowLosses:
    """The losses without some positions, or with the keys and values of some layers replaced by their mean."""
    block = range(part["first"], part["last"] + 1)
    if "site" not in part:
        return without_positions(subject, prefix, block)
    site: Site = part["site"]
    pairs = enumerate(prefix.layers[site])
    changed = tuple((_mean(key), _mean(value)) if index in block else (key, value) for index, (key, value) in pairs)
    return row_losses(subject, Prefix({**prefix.layers, site: changed}, prefix.header, prefix.head))


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


def _mean(tensor: Tensor) -> Tensor:
    """The mean over positions, at each position."""
    return tensor.mean(1, keepdim=True).expand_as(tensor)
