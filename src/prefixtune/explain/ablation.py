"""The loss with parts of a prefix left out: each position, each layer, keys or values; with intervals over the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefixtune.data.encoding import TokenizedExample
from prefixtune.evaluation.metrics.measurement import Array, Measurement, bootstrap, ratio
from prefixtune.explain.subject import Subject, View, with_layers
from prefixtune.prefix.geometry import Site
from prefixtune.prefix.prefix import Prefix
from prefixtune.training.score import score_targets

_PARTS = 32
"""Positions, and layers, are left out in at most so many blocks."""
Part = dict[str, Any]


def losses_of(subject: Subject, rows: Sequence[TokenizedExample], prefix: Prefix | None) -> Array:
    """The loss of each row in nats and how many labels it has, shape (rows, 2); with a head, that of its labels."""
    return score_targets(subject.backbone, prefix, rows, subject.batch_size, head=subject.prefix.head).numpy()


def row_losses(subject: Subject, prefix: Prefix | None, hidden: Sequence[int] = ()) -> Array:
    """As `losses_of`, with a prefix whose `hidden` positions are not seen (`Group.hidden`); a text is one row."""
    found = losses_of(subject, [replace(row, hidden=tuple(hidden)) for row in subject.tokenized], prefix)
    origins = subject.origins or range(len(found))
    return np.add.reduceat(found, np.flatnonzero(np.diff(origins, prepend=-1)), axis=0)


def loss_view(subject: Subject) -> View:
    """Losses of the whole prefix, of its controls, and with parts left out."""
    prefix = subject.prefix
    whole = row_losses(subject, prefix)

    def change(losses: Array) -> Part:
        """How much larger the loss per label is than with the whole prefix, and the paired interval over the rows."""
        mean, interval = _mean(np.stack([losses[:, 0] - whole[:, 0], whole[:, 1]], axis=1), subject.seed)
        return {"change": mean, "interval": interval}

    def compared(prefix: Prefix | None) -> Part:
        losses = row_losses(subject, prefix)
        return {"loss": _mean(losses, subject.seed)[0], **change(losses)}

    positions = [{"first": block[0], "last": block[-1]} for block in blocks(prefix.prefix_length, _PARTS)]
    layers = [
        {"site": site, "first": block[0], "last": block[-1]}
        for site, pairs in prefix.layers.items()
        for block in blocks(len(pairs), max(1, _PARTS // len(prefix.layers)))
    ]
    averaged_keys = with_layers(prefix, lambda key, value: (_averaged(key), value))
    averaged_values = with_layers(prefix, lambda key, value: (key, _averaged(value)))
    mean, interval = _mean(whole, subject.seed)
    numbers = {
        "rows": len(subject.tokenized),
        "labels": int(whole[:, 1].sum()),
        "whole": {"loss": mean, "interval": interval},
        "without_prefix": compared(None),
        "controls": {name: compared(control) for name, control in subject.controls.items()},
        "keys": change(row_losses(subject, averaged_keys)),
        "values": change(row_losses(subject, averaged_values)),
        "positions": [{**part, **change(_without(subject, part))} for part in positions],
        "layers": [{**part, **change(_without(subject, part))} for part in layers],
    }
    return View("loss", numbers)


def blocks(count: int, most: int) -> list[range]:
    """Numbers from 0 to `count`, in at most `most` blocks of neighbours.

    >>> blocks(5, 2), blocks(2, 9)
    ([range(0, 3), range(3, 5)], [range(0, 1), range(1, 2)])
    """
    size = max(1, -(-count // most))
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def _mean(losses: Array, seed: int) -> tuple[float, list[float] | None]:
    """The loss per label, and its 95 % bootstrap interval over the rows; of one row there is none."""
    measured = Measurement(losses, ratio, "loss per label", "loss", higher_is_better=False)
    return measured.score, list(bootstrap(measured, seed=seed)) if len(losses) > 1 else None


def _without(subject: Subject, part: Part) -> Array:
    """The losses without some positions, or with the keys and values of some layers replaced by their mean."""
    prefix, block = subject.prefix, range(part["first"], part["last"] + 1)
    if "site" not in part:
        return without_positions(subject, prefix, block)
    site: Site = part["site"]
    pairs = enumerate(prefix.layers[site])
    changed = tuple((_averaged(k), _averaged(v)) if index in block else (k, v) for index, (k, v) in pairs)
    return row_losses(subject, Prefix({**prefix.layers, site: changed}, prefix.header, prefix.head))


def without_positions(subject: Subject, prefix: Prefix, positions: range) -> Array:
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


def _averaged(tensor: Tensor) -> Tensor:
    """The mean over positions, at each position."""
    return tensor.mean(1, keepdim=True).expand_as(tensor)
