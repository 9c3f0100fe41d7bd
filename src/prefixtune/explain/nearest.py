"""The real text whose values are nearest to each position's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.attention.compute import prefix_from_tokens
from prefixtune.explain.subject import Subject, View
from prefixtune.prefix.prefix import Prefix

__all__ = ["WORDS", "cosines", "nearest_view"]


WORDS = (
    "the of and to in is that for it as was with be by on not he this are or his from at which but have an had they "
    "you were their one all we can her has there been if more when will would who so no say time people year day man "
    "thing woman life child world school group country problem place case week work night home water room mother "
    "money story fact book eye word business family city body face law car door art morning reason research teacher "
    "food good great restaurant price river cheap train answer question text translate write list describe sentence "
    "table label positive negative document email code number first new last long little"
)
"""Common words, for a corpus where no data is given."""
_LONGEST, _TOP = 64, 3
"""Tokens of a text that is run at once, and the neighbours that are kept."""
Tokens = list[dict[str, str]]
"""Of each token of the corpus: `token`, `context` (with the four before it) and `source`."""


def nearest_view(subject: Subject) -> View:
    """Each position's nearest tokens of real text, by values."""
    texts, corpus = _corpus(subject)
    probes = {"prefix": subject.prefix, **{k: p for k, p in subject.controls.items() if k != "shuffled"}}
    if len(texts) > 1:
        probes["text"] = _run(subject, texts[0][1])
    found: dict[str, list[Tensor]] = {name: [] for name in probes}
    tokens: Tokens = []
    for index in subject.timed(range(len(texts))):
        source, ids = texts[index]
        tokens += [{**_in_context(subject, ids, at), "source": source} for at in range(len(ids))]
        text = _run(subject, ids)
        for name, probe in probes.items():
            # The first text is a probe itself.
            if name != "text" or index:
                found[name].append(cosines(probe, text))
    best = {name: float(torch.cat(parts, 1).max(1).values.mean()) if parts else None for name, parts in found.items()}
    numbers = {
        "corpus": corpus,
        "tokens": len(tokens),
        "positions": _neighbours(torch.cat(found["prefix"], 1), tokens) if tokens else [],
        "mean_best": best.pop("prefix"),
        "controls": best,
    }
    return View("nearest", numbers)


def _neighbours(cosine: Float[Tensor, "P T"], tokens: Tokens) -> list[dict[str, Any]]:
    """Per position, its nearest tokens, different ones, nearest first."""
    values, indices = cosine.sort(dim=1, descending=True, stable=True)
    found: list[dict[str, Any]] = []
    for position, (row, which) in enumerate(zip(values, indices, strict=True)):
        nearest: dict[str, dict[str, Any]] = {}
        for value, index in zip(row.tolist(), which.tolist(), strict=True):
            # A text may have a token many times: only the nearest one counts.
            nearest.setdefault(tokens[index]["token"], {"cosine": value, **tokens[index]})
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


def _run(subject: Subject, ids: Sequence[int]) -> Prefix:
    backbone = subject.backbone
    return prefix_from_tokens(backbone.model, backbone.layout, torch.tensor([list(ids)], device=backbone.device))


def _corpus(subject: Subject) -> tuple[list[tuple[str, list[int]]], str]:
    """Texts of at most 64 tokens, each with where it is from, and what they are."""
    backbone, room = subject.backbone, subject.limits.corpus_tokens
    if subject.tokenized:
        name, rows = "the data", [[*row.prompt, *_target(subject, row.targets[0])] for row in subject.tokenized]
    else:
        name, rows = "a list of common words", [backbone.encode(f" {WORDS}")]
    started = (subject.prefix.header.get("initialization") or {}).get("text")
    pieces = [("start", backbone.encode(started))] if isinstance(started, str) and started else []
    pieces += [(name, row[first : first + _LONGEST]) for row in rows for first in range(0, len(row), _LONGEST)]
    kept: list[tuple[str, list[int]]] = []
    seen: set[tuple[int, ...]] = set()
    for source, ids in pieces:
        if tuple(ids) in seen:  # rows may share their source
            continue
        seen.add(tuple(ids))
        ids = ids[: min(_LONGEST, room)]
        room -= len(ids)
        if ids:
            kept.append((source, ids))
    described = f"{name} and the text that the prefix started from" if pieces[0][0] == "start" else name
    # The first is a probe too, which the start's own text should not be.
    return kept[::-1], described


def _target(subject: Subject, target: Sequence[int]) -> Sequence[int]:
    """A target's tokens where the same side of the model reads them; labels of a head are no tokens."""
    return target if subject.backbone.kind == "decoder" and not subject.has_head else ()


def _in_context(subject: Subject, ids: Sequence[int], at: int) -> dict[str, str]:
    """A token's text, and that of the four before it and itself."""
    decode = subject.backbone.tokenizer.decode
    return {"token": decode([ids[at]]), "context": decode(list(ids[max(0, at - 4) : at + 1]))}
