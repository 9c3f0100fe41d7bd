"""The real text whose values are nearest to each position's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.attention.compute import prefix_from_tokens
from prefixtune.explain.subject import Subject
from prefixtune.explain.view import View
from prefixtune.prefix.prefix import Prefix

__all__ = ["WORDS", "cosines", "nearest_view"]


WORDS = (
    "the of and to in is that for it as was with be by on not he this are or his from at which but have an had "
    "they you were their one all we can her has there been if more when will would who so no say time people year "
    "day man thing woman life child world school state family student group country problem hand part place case "
    "week company system program question work government number night point home water room mother area money "
    "story fact month lot right study book eye job word business issue side kind head house service friend father "
    "power hour game line end member law car city community name team minute idea body information back parent "
    "face others level office door health person art war history party result change morning reason research girl "
    "guy moment air teacher force education food place good great restaurant price river cheap family rating "
    "train answer question summary text translate write list describe sentence table label positive negative "
    "document email code number first new last long little"
)
"""Common words, for a corpus where no data is given."""
_LONGEST, _TOP = 64, 3
"""Tokens of a text that is run at once, and the neighbours that are kept."""


def nearest_view(subject: Subject) -> View:
    """Each position's nearest tokens of real text, by values."""
    texts, corpus = _corpus(subject)
    probes = {"prefix": subject.prefix, **{k: p for k, p in subject.controls.items() if k != "shuffled"}}
    if len(texts) > 1:
        probes["text"] = _run(subject, texts[0][1])
    found = {name: _Neighbours(probe.prefix_length) for name, probe in probes.items()}
    tokens = 0
    for index in subject.timed(range(len(texts))):
        source, ids = texts[index]
        tokens += len(ids)
        text = _run(subject, ids)
        for name, probe in probes.items():
            # The first text is a probe itself.
            if name != "text" or index:
                found[name].add(cosines(probe, text), [(source, _context(subject, ids, at)) for at in range(len(ids))])
    numbers = {
        "corpus": corpus,
        "tokens": tokens,
        "positions": found["prefix"].describe(),
        "mean_best": found["prefix"].mean(),
        "controls": {name: each.mean() for name, each in found.items() if name != "prefix"},
    }
    return View("nearest", numbers)


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


def _context(subject: Subject, ids: Sequence[int], at: int) -> tuple[str, str]:
    """A token's text, and that of the four before it and itself."""
    decode = subject.backbone.tokenizer.decode
    return decode([ids[at]]), decode(list(ids[max(0, at - 4) : at + 1]))


@dataclass(frozen=True)
class _Neighbour:
    cosine: float
    token: str
    context: str
    source: str


class _Neighbours:
    """The nearest tokens of each position so far, different ones, nearest first."""

    def __init__(self, length: int) -> None:
        self._best: list[list[_Neighbour]] = [[] for _ in range(length)]

    def add(self, cosine: Float[Tensor, "P T"], tokens: Sequence[tuple[str, tuple[str, str]]]) -> None:
        """Take the tokens of one more text into account."""
        values, indices = cosine.sort(dim=1, descending=True, stable=True)
        for mine, row, which in zip(self._best, values.tolist(), indices.tolist(), strict=True):
            fresh: dict[str, _Neighbour] = {}
            for value, index in zip(row, which, strict=True):
                # A text may have a token many times: only the nearest one counts.
                source, (token, context) = tokens[index]
                fresh.setdefault(token, _Neighbour(value, token, context, source))
                if len(fresh) == _TOP:
                    break
            by_token: dict[str, _Neighbour] = {}
            for each in sorted([*mine, *fresh.values()], key=lambda neighbour: -neighbour.cosine):
                by_token.setdefault(each.token, each)
            mine[:] = list(by_token.values())[:_TOP]

    def describe(self) -> list[dict[str, Any]]:
        """Per position, its neighbours."""
        return [{"position": at, "nearest": [vars(near) for near in row]} for at, row in enumerate(self._best)]

    def mean(self) -> float | None:
        """The mean over positions of the nearest token's cosine."""
        best = [row[0].cosine for row in self._best if row]
        return sum(best) / len(best) if best else None
