"""The real text whose values are nearest to each position's."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.attention.record import prefix_from_tokens
from prefixtune.explain.subject import Subject, View
from prefixtune.prefix.prefix import Prefix

_MOST_TOKENS, _LONGEST, _TOP = 2048, 64, 3
"""Tokens of the corpus and of a text that is run at once, at most, and the neighbours that are kept."""


def nearest_view(subject: Subject) -> View:
    """Each position's nearest tokens of real text, by values."""
    backbone, texts = subject.backbone, _corpus(subject)
    probes = {"prefix": subject.prefix, **{k: p for k, p in subject.controls.items() if k != "shuffled"}}
    parts: dict[str, list[Tensor]] = {name: [] for name in probes}
    for ids in texts:
        text = prefix_from_tokens(backbone.model, backbone.layout, torch.tensor([ids], device=backbone.device))
        for name, probe in probes.items():
            parts[name].append(cosines(probe, text))
    best = {name: float(torch.cat(found, 1).max(1).values.mean()) for name, found in parts.items()}
    tokens = [(ids, at) for ids in texts for at in range(len(ids))]
    numbers = {
        "tokens": len(tokens),
        "positions": _neighbours(subject, torch.cat(parts["prefix"], 1), tokens),
        "mean_best": best.pop("prefix"),
        "controls": best,
    }
    return View("nearest", numbers)


def _neighbours(
    subject: Subject, cosine: Float[Tensor, "P T"], tokens: Sequence[tuple[Sequence[int], int]]
) -> list[dict[str, Any]]:
    """Per position, its nearest tokens, different ones, nearest first; each with the four tokens before it."""
    decode = subject.backbone.tokenizer.decode
    values, indices = cosine.sort(dim=1, descending=True, stable=True)
    found: list[dict[str, Any]] = []
    for position, (row, which) in enumerate(zip(values.tolist(), indices.tolist(), strict=True)):
        nearest: dict[int, dict[str, Any]] = {}
        for value, index in zip(row, which, strict=True):
            ids, at = tokens[index]
            # A text may have a token many times: only the nearest one counts.
            if ids[at] not in nearest:
                context = decode(list(ids[max(0, at - 4) : at + 1]))
                nearest[ids[at]] = {"cosine": value, "token": decode([ids[at]]), "context": context}
            if len(nearest) == _TOP:
                break
        found.append({"position": position, "nearest": list(nearest.values())})
    return found


def cosines(prefix: Prefix, text: Prefix) -> Float[Tensor, "P T"]:
    """Cosine of each position's and each token's values: of all heads of a layer as one, the mean over layers."""
    total = torch.zeros(prefix.prefix_length, text.prefix_length)
    layers = torch.zeros(prefix.prefix_length, 1)
    for site, pairs in prefix.layers.items():
        length = prefix.length(site)
        for (_, mine), (_, other) in zip(pairs, text.layers[site], strict=True):
            a, b = (torch.nn.functional.normalize(each.transpose(0, 1).flatten(1).float()) for each in (mine, other))
            total[:length] += a @ b.T
            layers[:length] += 1
    return total / layers.clamp(min=1)


def _corpus(subject: Subject) -> list[tuple[int, ...]]:
    """Texts as tokens: the data, and the text that the prefix started from.

    Of an encoder's data only the sources, which the same side of the model reads; labels of a head are no tokens.
    """
    reads_targets = subject.backbone.kind == "decoder" and subject.prefix.head is None
    rows = [[*row.prompt, *(row.targets[0] if reads_targets else ())] for row in subject.tokenized]
    started = (subject.prefix.header.get("initialization") or {}).get("text")
    if isinstance(started, str):
        rows.insert(0, subject.backbone.encode(started))
    # Rows may share their source.
    pieces = dict.fromkeys(tuple(row[at : at + _LONGEST]) for row in rows for at in range(0, len(row), _LONGEST))
    ends = itertools.accumulate(map(len, pieces))
    return [piece for piece, end in zip(pieces, ends, strict=True) if end <= _MOST_TOKENS]
