"""Where a prefix begins: real words' activations, or another prefix. A random start needs no backbone.

Starting from real words matters most with little data (Li & Liang 2021, section 7.4).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from prefixtune import attach
from prefixtune.attach import check_fits
from prefixtune.backbone import Backbone
from prefixtune.errors import ConfigError
from prefixtune.prefix import Prefix

__all__ = ["from_prefix", "from_words", "word_ids"]


def from_words(backbone: Backbone, text: str, prefix_length: int | Mapping[str, int]) -> Prefix:
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
        ConfigError: The text has no token.
    """
    lengths = _by_site(backbone, prefix_length)
    runs = {
        length: attach.record(backbone.model, backbone.layout, word_ids(backbone, text, length))
        for length in set(lengths.values())
    }
    return Prefix({site: runs[length].layers[site] for site, length in lengths.items()})


def word_ids(backbone: Backbone, text: str, length: int) -> Int[Tensor, "1 P"]:
    """The tokens of some words, cycled where they are fewer than `length`, cut where they are more.

    Raises:
        ConfigError: The text has no token.
    """
    ids = backbone.encode(text)
    if not ids:
        raise ConfigError(f"init_text {text!r} has no token.", hint="give some words, such as the task's name.")
    return torch.tensor([[ids[place % len(ids)] for place in range(length)]], device=backbone.device)


def from_prefix(backbone: Backbone, prefix: Prefix, prefix_length: int | Mapping[str, int]) -> Prefix:
    """Another prefix as a start.

    Raises:
        BackboneError: It does not fit the backbone.
        ConfigError: Its sites or lengths are others.
    """
    check_fits(prefix, backbone.geometry, backbone.name)
    wanted = _by_site(backbone, prefix_length)
    given = {site: prefix.length(site) for site in prefix.sites}
    if given != wanted:
        raise ConfigError(
            f"the prefix to start from has length {_spell(given)}, but prefix_length is {_spell(wanted)}.",
            hint=f"set prefix_length to {_spell(given)}, or slice the prefix.",
        )
    return prefix.to(torch.float32)


def _by_site(backbone: Backbone, prefix_length: int | Mapping[str, int]) -> dict[str, int]:
    if isinstance(prefix_length, int):
        return dict.fromkeys(backbone.geometry, prefix_length)
    return dict(prefix_length)


def _spell(lengths: Mapping[str, int]) -> str:
    """Lengths by site as a person writes them: `10`, or `encoder=10,cross=5`.

    >>> _spell({"decoder": 10}), _spell({"encoder": 10, "cross": 5})
    ('10', 'encoder=10,cross=5')
    """
    if len(lengths) == 1:
        return str(*lengths.values())
    return ",".join(f"{site}={length}" for site, length in lengths.items())
