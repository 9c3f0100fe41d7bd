"""A start from real words' activations: it matters most with little data (Li & Liang 2021, section 7.4)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from prefixtune.attention.compute import prefix_from_tokens
from prefixtune.backbone.backbone import Backbone
from prefixtune.errors import ConfigError
from prefixtune.prefix.geometry import Site
from prefixtune.prefix.prefix import Prefix
from prefixtune.training.starts.start import by_site

__all__ = ["check_words_fit", "from_words", "word_ids"]


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
    lengths = by_site(backbone, prefix_length)
    check_words_fit(backbone, lengths)
    runs = {
        length: prefix_from_tokens(backbone.model, backbone.layout, word_ids(backbone, text, length))
        for length in set(lengths.values())
    }
    return Prefix({site: runs[length].layers[site] for site, length in lengths.items()})


def check_words_fit(backbone: Backbone, lengths: Mapping[Site, int]) -> None:
    """Refuse a prefix with more positions than the model, which reads the words.

    Raises:
        ConfigError: It has.
    """
    longest, allowed = max(lengths.values()), backbone.max_positions
    if allowed is not None and longest > allowed:
        raise ConfigError(
            f"a prefix of {longest:,} cannot start from words: {backbone.name!r} reads at most {allowed:,} tokens.",
            hint="choose a shorter --prefix-length, or --initialization random.",
        )


def word_ids(backbone: Backbone, text: str, length: int) -> Int[Tensor, "1 P"]:
    """The tokens of some words, cycled where they are fewer than `length`, cut where they are more.

    Raises:
        ConfigError: The text has no token.
    """
    ids = backbone.encode(text)
    if not ids:
        raise ConfigError(f"init_text {text!r} has no token.", hint="give some words, such as the task's name.")
    return torch.tensor([[ids[index % len(ids)] for index in range(length)]], device=backbone.device)
