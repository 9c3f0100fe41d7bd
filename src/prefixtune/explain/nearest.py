"""The real text whose keys and values are nearest to each position's."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.attention.compute import prefix_from_tokens
from prefixtune.errors import BackboneError
from prefixtune.explain.start import are_counts, is_beginning
from prefixtune.explain.subject import Subject
from prefixtune.explain.view import View
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.rotation import Rotation
from prefixtune.training.starts.compaction import evenly_spaced

__all__ = ["WORDS", "cosines", "key_positions", "nearest_view", "turned_back"]


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
_MOST_TOKENS, _MOST_POSITIONS = 2**31, 2**20
"""Of a text that a header names, and of what is kept of all of them."""
Part = Literal["keys", "values"]


def nearest_view(subject: Subject) -> View:
    """Each position's nearest tokens of real text, by keys and by values."""
    texts, corpus = _corpus(subject)
    probes = {"prefix": subject.prefix, **{k: p for k, p in subject.controls.items() if k != "shuffled"}}
    if len(texts) > 1:
        probes["text"] = _run(subject, texts[0][1])
    rotation = _rotation(subject)
    positions = {name: key_positions(probe) for name, probe in probes.items()}
    probes = {name: turned_back(probe, rotation, positions[name]) for name, probe in probes.items()}
    unknown = {name for name in probes if rotation is not None and positions[name] is None}
    found = {name: _Neighbours(probe.prefix_length) for name, probe in probes.items()}
    tokens = 0
    for index in subject.timed(range(len(texts))):
        source, ids = texts[index]
        tokens += len(ids)
        for part, one in _cosines_by_probe(subject, probes, rotation, ids):
            for name, matrix in one.items():
                if (name != "text" or index) and (part != "keys" or name not in unknown):
                    found[name].add(part, matrix, [(source, _context(subject, ids, at)) for at in range(len(ids))])
    numbers = {
        "corpus": corpus,
        "tokens": tokens,
        "positions": found["prefix"].describe(),
        "mean_best": found["prefix"].means(),
        "controls": {name: each.means() for name, each in found.items() if name != "prefix"},
    }
    return View("nearest", numbers, tuple(_notes(subject.prefix, rotation, positions["prefix"])))


def _notes(prefix: Prefix, rotation: Rotation | None, positions: Sequence[int] | None) -> Iterator[str]:
    """What a reader should know of the cosines of keys."""
    if rotation is None:
        yield "Keys also hold their position: a token's count as it stood in its text."
    elif positions is None:
        yield (
            "Keys are left out: the start was compacted by 'match', in each head from other positions of its text, "
            "which the file does not name."
        )
    elif not is_beginning(prefix.header.get("composition")) or _start_of(prefix).get("kind") == "prefix":
        yield (
            "Keys are compared as if each stood at its position in the prefix: the file does not say whether what it "
            "was made of was compacted from a longer text."
        )


def _rotation(subject: Subject) -> Rotation | None:
    """How keys turn with position, to compare them at one; None where they cannot be turned."""
    if subject.backbone.kind != "decoder":
        return None
    try:
        rotation = subject.backbone.rotation
    except BackboneError:
        return None
    return rotation if rotation.layers else None


def key_positions(prefix: Prefix) -> Sequence[int] | None:
    """Where each key of a decoder's prefix stood in its start; None: the header does not tell.

    A text of T tokens that was compacted to P positions ends where these end, so that its own position p stands at
    p + P - T, which may be negative.
    """
    own = range(prefix.prefix_length)
    start = _start_of(prefix)
    blocks = _blocks(start)
    if start.get("compaction") == "match" and any(tokens > length for tokens, length in blocks):
        return None
    # The header may say anything, so that little is computed.
    count = sum(length for _, length in blocks)
    if not (is_beginning(prefix.header.get("composition")) and len(own) <= count <= _MOST_POSITIONS):
        return own
    ends = itertools.accumulate(length for _, length in blocks)
    positions = [
        end - tokens + position
        for end, (tokens, length) in zip(ends, blocks, strict=True)
        for position in evenly_spaced(tokens, length).tolist()
    ]
    return positions[: len(own)]


def _start_of(prefix: Prefix) -> Mapping[str, Any]:
    return prefix.header.get("initialization") or {}


def _blocks(start: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The tokens of each text that a prefix started from, and how many were kept; none: its positions are its own."""
    tokens, lengths = start.get("tokens"), start.get("lengths")
    if start.get("kind") == "text":
        pair = [tokens, start.get("turned_back")]
        if not are_counts(pair, most=_MOST_TOKENS):
            return []
        tokens, lengths = [pair[0]], [pair[0] - pair[1]]
    elif start.get("kind") != "examples":
        return []
    if not (are_counts(tokens, most=_MOST_TOKENS) and are_counts(lengths, most=_MOST_TOKENS)):
        return []
    blocks = list(zip(tokens, lengths, strict=False))
    return blocks if all(1 <= length <= count for count, length in blocks) else []


def turned_back(prefix: Prefix, rotation: Rotation | None, positions: Sequence[int] | None = None) -> Prefix:
    """A prefix whose keys are turned to what they were at position 0.

    Args:
        prefix: A prefix.
        rotation: How its keys turn; None: it is returned unchanged.
        positions: Where each key stands; None: each at its position in the prefix.
    """
    if rotation is None:
        return prefix
    stand = range(prefix.prefix_length) if positions is None else positions
    moved = [rotation.turn(prefix[index : index + 1], -at).layers for index, at in enumerate(stand)]
    return Prefix(
        {
            site: tuple(
                (torch.cat([one[site][layer][0] for one in moved], dim=1), value)
                for layer, (_, value) in enumerate(pairs)
            )
            for site, pairs in prefix.layers.items()
        }
    )


def cosines(prefix: Prefix, text: Prefix, part: Part) -> Float[Tensor, "P T"]:
    """Cosine of each position and each token: of all heads' vectors of a layer as one, the mean over layers."""
    side = 0 if part == "keys" else 1
    total = torch.zeros(prefix.prefix_length, text.prefix_length)
    layers = torch.zeros(prefix.prefix_length, 1)
    for site, pairs in prefix.layers.items():
        length = prefix.length(site)
        for mine, other in zip(pairs, text.layers[site], strict=True):
            a, b = (torch.nn.functional.normalize(x[side].transpose(0, 1).flatten(1).float()) for x in (mine, other))
            total[:length] += a @ b.T
            layers[:length] += 1
    return total / layers.clamp(min=1)


def _cosines_by_probe(
    subject: Subject, probes: Mapping[str, Prefix], rotation: Rotation | None, ids: Sequence[int]
) -> Iterator[tuple[Part, dict[str, Float[Tensor, "_P _T"]]]]:
    text = turned_back(_run(subject, ids), rotation)
    yield "keys", {name: cosines(probe, text, "keys") for name, probe in probes.items()}
    yield "values", {name: cosines(probe, text, "values") for name, probe in probes.items()}


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
    started = _start_of(subject.prefix).get("text")
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
        self._best: dict[Part, list[list[_Neighbour]]] = {p: [[] for _ in range(length)] for p in ("keys", "values")}

    def add(self, part: Part, cosine: Float[Tensor, "P T"], tokens: Sequence[tuple[str, tuple[str, str]]]) -> None:
        """Take the tokens of one more text into account."""
        values, indices = cosine.sort(dim=1, descending=True, stable=True)
        for mine, row, which in zip(self._best[part], values.tolist(), indices.tolist(), strict=True):
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
        """Per position, its neighbours by keys and by values."""
        rows = zip(*self._best.values(), strict=True)
        return [
            {
                "position": position,
                **{part: [vars(n) for n in near] for part, near in zip(self._best, row, strict=True)},
            }
            for position, row in enumerate(rows)
        ]

    def means(self) -> dict[str, float | None]:
        """The mean over positions of the nearest token's cosine."""
        best = {part: [near[0].cosine for near in rows if near] for part, rows in self._best.items()}
        return {part: sum(row) / len(row) if row else None for part, row in best.items()}
