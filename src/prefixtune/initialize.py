"""Where a prefix begins: real words' activations, or another prefix. A random start needs no backbone.

Starting from real words matters most with little data (Li & Liang 2021, section 7.4).
"""

from __future__ import annotations

import torch

from prefixtune import attach
from prefixtune.attach import check_fits
from prefixtune.backbone import Backbone
from prefixtune.errors import ConfigError
from prefixtune.prefix import Prefix

__all__ = ["from_prefix", "from_words"]


def from_words(backbone: Backbone, text: str, prefix_length: int) -> Prefix:
    """The keys and values that the frozen model computes for real words.

    The words' tokens are cycled where they are fewer than P, and cut where they are more, then run through the model
    as one text; so the prefix is exactly what the model would have cached for it.

    Args:
        backbone: The frozen model.
        text: Any words.
        prefix_length: P.

    Raises:
        ConfigError: The text has no token.
    """
    ids = backbone.encode(text)
    if not ids:
        raise ConfigError(f"init_text {text!r} has no token.", hint="give some words, such as the task's name.")
    cycled = [ids[place % len(ids)] for place in range(prefix_length)]
    return attach.record(backbone.model, backbone.layout, torch.tensor([cycled], device=backbone.device))


def from_prefix(backbone: Backbone, prefix: Prefix, prefix_length: int) -> Prefix:
    """Another prefix as a start.

    Raises:
        BackboneError: It does not fit the backbone.
        ConfigError: Its length is another.
    """
    check_fits(prefix, backbone.geometry, backbone.name)
    if prefix.prefix_length != prefix_length:
        raise ConfigError(
            f"the prefix to start from has length {prefix.prefix_length}, but prefix_length is {prefix_length}.",
            hint=f"set prefix_length to {prefix.prefix_length}, or slice the prefix.",
        )
    return prefix.to(torch.float32)
