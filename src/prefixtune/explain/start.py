"""The start of a prefix, computed again from its header."""

from __future__ import annotations

import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.prefix.prefix import Prefix
from prefixtune.training.starts.words import from_words

__all__ = ["find_start"]


def find_start(backbone: Backbone, prefix: Prefix) -> tuple[Prefix | None, str]:
    """The prefix before its first step, and what it was; None where it cannot be computed again, and why.

    Raises:
        ConfigError: The words in the header have no token.
    """
    stored = prefix.header.get("initialization")
    if not isinstance(stored, dict) or "kind" not in stored:
        return None, "the file does not say what training started from."
    kind, text = stored["kind"], stored.get("text")
    if prefix.header.get("method") == "prompt":
        return None, "a prompt at the input layer starts from embeddings, which are no keys and values."
    if kind == "words" and isinstance(text, str):
        lengths = {site: prefix.length(site) for site in prefix.sites}
        start = from_words(backbone, text, lengths).to(torch.float32, "cpu")
        return Prefix(start.layers, prefix.header, prefix.head), f"the words {text!r}"
    if kind == "random":
        return None, "training started from random numbers, which the file does not hold."
    return None, f"training started from {kind!r}, whose keys and values the file does not hold."
