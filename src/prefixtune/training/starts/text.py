"""A start from a text: the keys and values that the model computes for a prompt or a document, whole or fewer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prefixtune.attention.compute import prefix_from_tokens
from prefixtune.backbone.backbone import Backbone
from prefixtune.data.streams import read_text
from prefixtune.errors import BackboneError, ConfigError, DataError
from prefixtune.prefix.geometry import Site
from prefixtune.prefix.prefix import Prefix
from prefixtune.training.config import TrainConfig
from prefixtune.training.starts.compaction import evenly_spaced, match, moved, take
from prefixtune.training.starts.start import Start

__all__ = ["MAX_TEXT_BYTES", "InitText", "from_text", "read_init_text", "stored_text", "text_ids"]


_MAX_STORED = 10_000
"""Characters of a text that a header keeps."""
MAX_TEXT_BYTES = 2**20
"""Most bytes of a file that a run starts from."""


@dataclass(frozen=True)
class InitText:
    """What `init_text` gives.

    Attributes:
        text: The words or the text.
        file: Name of the file that holds it; empty: the text itself was given.
    """

    text: str
    file: str = ""

    @property
    def description(self) -> dict[str, Any]:
        """What a header says of it: a file's name, or the text; of a long one the beginning, and how long it is."""
        if self.file:
            return {"file": self.file}
        if len(self.text) <= _MAX_STORED:
            return {"text": self.text}
        return {"text": self.text[:_MAX_STORED], "characters": len(self.text)}


def stored_text(description: Mapping[str, Any]) -> str | None:
    """The whole text that a header's `initialization` names; None: it has none, or only the beginning of it."""
    text, characters = description.get("text"), description.get("characters")
    if not isinstance(text, str) or characters not in (None, len(text)):
        return None
    return text


def read_init_text(init_text: str) -> InitText:
    """The text that `init_text` gives: what it says, or with `@` in front the content of that file.

    Raises:
        DataError: The file is missing, empty, too large, or no UTF-8 text.
    """
    if not init_text.startswith("@"):
        return InitText(init_text)
    path = Path(init_text[1:])
    if path.is_dir() or not init_text[1:]:
        raise DataError(
            f"init_text is {init_text!r}, but a file is needed after @.", hint="write it as in --init-text @prompt.txt."
        )
    return InitText(read_text(path, max_bytes=MAX_TEXT_BYTES, needed="one word"), path.name)


def too_short(source: InitText, count: str, config: TrainConfig) -> DataError:
    """The error of a text that has fewer tokens than the prefix has positions."""
    name = source.file or f"init_text {source.text[:40]!r}"
    wanted = f"sites is {config.sites!r}" if config.sites else f"prefix_length is {config.prefix_length}"
    return DataError(
        f"{name} {count}, but {wanted}.",
        hint="give a smaller --prefix-length (0: as long as the text), or --initialization words, which repeats them.",
    )


def text_ids(config: TrainConfig, backbone: Backbone) -> list[int]:
    """The tokens of the text that a run starts from.

    Raises:
        ConfigError: The text has no token.
        DataError: Its file cannot be read; or it has fewer tokens than P.
    """
    source = read_init_text(config.init_text)
    ids = backbone.encode(source.text)
    if not ids:
        raise ConfigError(f"init_text {source.text[:40]!r} has no token.", hint="give some words.")
    if len(ids) < config.longest:
        raise too_short(source, f"has {len(ids):,} tokens", config)
    return ids


def from_text(config: TrainConfig, backbone: Backbone, lengths: Mapping[Site, int]) -> Start:
    """The keys and values that the frozen model computes for a text: whole, cut, or compacted to P positions.

    The text is run through the model as one row. Its first P tokens are what `cut` keeps. `stride` keeps the keys and
    values of P positions of the whole, evenly spaced; `match` chooses positions head by head, and values for them (see
    `compaction.match`). Where a model's keys turn with the position, the kept ones are turned back by T - P, so that a
    text behind the prefix, which starts at P, is as far from them as it would be from the whole text.

    Args:
        config: The run: `init_text`, `compaction`.
        backbone: The frozen model.
        lengths: P by site, each at most the text's length T.

    Raises:
        ConfigError: The text has no token, or more tokens than the model has positions; or its keys turn with the
            position, but cannot be turned back.
        DataError: Its file cannot be read; or it has fewer tokens than P.
    """
    ids = text_ids(config, backbone)
    description = {"kind": "text", **read_init_text(config.init_text).description, "tokens": len(ids)}
    longest = max(lengths.values())
    if len(ids) > longest and config.compaction == "cut":
        return Start(take(_compute(backbone, ids[:longest]), _first(lengths)), {**description, "compaction": "cut"})
    if len(ids) > longest:
        _check_turns(config, backbone)
    whole = _compute(backbone, ids)
    if all(length == len(ids) for length in lengths.values()):
        return Start(Prefix({site: whole.layers[site] for site in lengths}), description)
    description["compaction"] = config.compaction
    if config.compaction == "stride":
        kept = take(whole, {site: evenly_spaced(len(ids), length) for site, length in lengths.items()})
    elif config.compaction == "match":
        kept = match(backbone, whole, ids, lengths)
    else:
        return Start(take(whole, _first(lengths)), description)
    # The text behind stands as far from the kept keys as it would behind the whole text.
    kept, turned = moved(backbone, kept, max(lengths.values()) - len(ids))
    return Start(kept, {**description, "turned_back": -turned})


def _first(lengths: Mapping[Site, int]) -> dict[Site, torch.Tensor]:
    return {site: torch.arange(length) for site, length in lengths.items()}


def _check_turns(config: TrainConfig, backbone: Backbone) -> None:
    """Refuse to compact where keys would have to be turned back, but cannot be.

    Raises:
        ConfigError: They cannot.
    """
    try:
        _ = backbone.rotation
    except BackboneError as error:
        raise ConfigError(
            f"compaction {config.compaction!r} cannot turn the kept keys back: {error.message}",
            hint="give --compaction cut, which reads the text's first P tokens alone.",
        ) from error


def _compute(backbone: Backbone, ids: list[int]) -> Prefix:
    """The keys and values of a text.

    Raises:
        ConfigError: It has more tokens than the model has positions.
    """
    limit = backbone.max_positions_with(len(ids))
    if limit is not None and len(ids) > limit:
        raise ConfigError(
            f"init_text has {len(ids):,} tokens, but {backbone.name!r} reads at most {limit:,}.",
            hint="shorten it, or give --compaction cut, which reads its first P tokens alone.",
        )
    return prefix_from_tokens(backbone.model, backbone.layout, torch.tensor([ids], device=backbone.device))
