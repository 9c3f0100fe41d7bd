"""A start from real words: repeated or cut to P, or a whole text, compacted to P where it is longer.

Real words matter most with little data (Li & Liang 2021, section 7.4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prefixtune.attention.record import prefix_from_tokens
from prefixtune.backbone.backbone import Backbone
from prefixtune.data.encoding import TokenizedExample
from prefixtune.data.streams import read_text
from prefixtune.errors import ConfigError, DataError
from prefixtune.prefix.geometry import Site
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.routing import nearest
from prefixtune.training.config import TrainConfig
from prefixtune.training.starts import compaction

_MAX_STORED = 10_000
"""Characters of a text that a header keeps."""
MAX_TEXT_BYTES = 2**24
"""Most bytes of a file that a run starts from."""


@dataclass(frozen=True)
class Start:
    """What a run's prefix starts from.

    Attributes:
        prefix: In float32; None: random numbers.
        description: What the header says of it: its `kind` and more.
    """

    prefix: Prefix | None
    description: dict[str, Any]


def read_init_text(init_text: str) -> tuple[str, dict[str, Any]]:
    """The words or the text of the option `init_text`, and what a header says of it; `@FILE` is that file's content.

    Raises:
        DataError: The file is missing, empty, too large, or no UTF-8 text.
    """
    if not init_text.startswith("@"):
        return init_text, {"text": init_text[:_MAX_STORED]}
    path = Path(init_text[1:])
    if path.is_dir() or not init_text[1:]:
        raise DataError(f"init_text is {init_text!r}, but a file is needed after @.", hint="name one.")
    return read_text(path, max_bytes=MAX_TEXT_BYTES, needed="one word"), {"file": path.name}


def _ids(backbone: Backbone, text: str) -> list[int]:
    """The tokens of a text.

    Raises:
        ConfigError: It has none.
    """
    ids = backbone.encode(text)
    if not ids:
        raise ConfigError(f"init_text {text[:40]!r} has no token.", hint="give some words, such as the task's name.")
    return ids


# --- words -----------------------------------------------------------------------------------------------------------


def from_words(backbone: Backbone, text: str, prefix_length: int | Mapping[Site, int]) -> Prefix:
    """The keys and values that the frozen model computes for real words.

    The words' tokens are cycled where they are fewer than P, and cut where they are more, then run through the model
    as one text; so the prefix is exactly what the model would have cached for it. An encoder-decoder reads the words
    on both sides: `encoder` and `decoder` get their own self-attention's keys and values, `cross` those that the
    decoder computes from the encoded words.

    Args:
        backbone: The frozen model.
        text: Any words.
        prefix_length: P; or P by site, and then only these sites.

    Raises:
        ConfigError: The text has no token, or the model reads fewer than P.
    """
    lengths = dict.fromkeys(backbone.geometry, prefix_length) if isinstance(prefix_length, int) else prefix_length
    check_words_fit(backbone, lengths)
    ids = _ids(backbone, text)

    cycled = {length: [ids[index % len(ids)] for index in range(length)] for length in set(lengths.values())}
    runs = {length: _compute(backbone, row) for length, row in cycled.items()}
    return Prefix({site: runs[length].layers[site] for site, length in lengths.items()})


def _compute(backbone: Backbone, ids: list[int]) -> Prefix:
    """The keys and values of a text."""
    return prefix_from_tokens(backbone.model, backbone.layout, torch.tensor([ids], device=backbone.device))


def check_words_fit(backbone: Backbone, lengths: Mapping[Site, int]) -> None:
    """Refuse a prefix with more positions than the model, which reads the words or the text.

    Raises:
        ConfigError: It has.
    """
    longest = max(lengths.values())
    allowed = backbone.max_positions_with(longest)
    if allowed is not None and longest > allowed:
        raise ConfigError(
            f"a prefix of {longest:,} cannot start from a text: {backbone.name!r} reads at most {allowed:,}.",
            hint="choose a shorter one, or --initialization random.",
        )


# --- a text ----------------------------------------------------------------------------------------------------------


def text_ids(config: TrainConfig, backbone: Backbone) -> list[int]:
    """The tokens of the text that a run starts from.

    Raises:
        ConfigError: The text has no token, or fewer than P.
        DataError: Its file cannot be read.
    """
    text, description = read_init_text(config.init_text)
    ids = _ids(backbone, text)
    if len(ids) < config.longest:
        name = description.get("file") or f"init_text {text[:40]!r}"
        wanted = f"sites is {config.sites!r}" if config.sites else f"prefix_length is {config.prefix_length}"
        raise ConfigError(
            f"{name} has {len(ids):,} tokens, but {wanted}.",
            hint="give a smaller --prefix-length, or --initialization words.",
        )
    return ids


def from_text(
    config: TrainConfig, backbone: Backbone, lengths: Mapping[Site, int], questions: Sequence[TokenizedExample] = ()
) -> Start:
    """The keys and values that the frozen model computes for a text: whole, cut, or compacted to P positions.

    The text is run through the model as one row. Its first P tokens are what `cut` keeps. `stride` keeps the keys and
    values of P positions of the whole, evenly spaced; `match` chooses positions head by head, and keys and values for
    them (see `compaction.match`). Where a model's keys turn with the position, the kept ones are turned back by T - P,
    so that a text behind the prefix, which starts at P, is as far from them as it would be from the whole text. A text
    that is too long for one row is compacted in pieces of equal length, each with the questions that share its words.

    Args:
        config: The run: `init_text`, `compaction`.
        backbone: The frozen model.
        lengths: P by site, each at most the text's length T.
        questions: About the text, with their answers, for `match`.

    Raises:
        BackboneError: Its keys turn with the position, but cannot be turned back.
        ConfigError: The text has no token.
        DataError: Its file cannot be read; or it has fewer tokens than P, or more pieces.
    """
    ids = text_ids(config, backbone)
    description = {"kind": "text", **read_init_text(config.init_text)[1], "tokens": len(ids)}
    longest = max(lengths.values())
    if set(lengths.values()) != {len(ids)}:
        description["compaction"] = config.compaction
    if config.compaction == "cut" or len(ids) == longest:
        whole = _compute(backbone, ids[:longest])
        return Start(
            compaction.take(whole, {site: torch.arange(length) for site, length in lengths.items()}), description
        )
    # Keys that cannot be turned back are refused.
    _ = backbone.rotation
    count = -(-len(ids) // compaction.piece_length(backbone))
    if count > min(lengths.values()):
        raise DataError(
            f"the text is compacted in {count:,} pieces, but the prefix has {min(lengths.values())} positions.",
            hint="choose a longer --prefix-length, or --compaction cut.",
        )
    pieces = [ids[len(ids) * index // count : len(ids) * (index + 1) // count] for index in range(count)]
    find = nearest([backbone.decode(piece) for piece in pieces])
    about = [find(backbone.decode(list(question.prompt))) or 0 for question in questions]
    parts: list[Prefix] = []
    for number, piece in enumerate(pieces):
        shares = {site: P * (number + 1) // count - P * number // count for site, P in lengths.items()}
        whole = _compute(backbone, piece)
        if config.compaction == "match":
            own = [question for question, index in zip(questions, about, strict=True) if index == number]
            kept, facts = compaction.match(backbone, whole, piece, shares, own)
            description |= facts
        else:
            kept = compaction.take(
                whole, {site: compaction.evenly_spaced(len(piece), length) for site, length in shares.items()}
            )
        # What follows stands as far from the kept keys as it would from the whole piece.
        parts.append(compaction.moved(backbone, kept, longest * (number + 1) // count - len(piece))[0])
    description["turned_back"] = len(ids) - longest if compaction.can_move(backbone) else 0
    return Start(compaction.side_by_side(parts), description)
