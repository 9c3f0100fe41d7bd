"""The start of a prefix, computed again from its header."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.data.encoding import encode_pairs, format_of
from prefixtune.data.examples import Example
from prefixtune.data.labels import check_known, labels_of, with_label_words
from prefixtune.prefix.geometry import Site
from prefixtune.prefix.prefix import Prefix
from prefixtune.training.data import held_out_rows
from prefixtune.training.starts.examples import from_examples
from prefixtune.training.starts.text import stored_text
from prefixtune.training.starts.words import from_words

__all__ = ["are_counts", "find_start", "is_beginning"]

_MOST_WORDS = 2**13
"""Longest prefix whose start is computed whole to take its beginning: a header may name any length."""


def find_start(backbone: Backbone, prefix: Prefix, train: Sequence[Example] = ()) -> tuple[Prefix | None, str]:
    """The prefix before its first step, and what it was; None where it cannot be computed again, and why.

    Args:
        backbone: Of the prefix.
        prefix: With its header.
        train: The examples that it was trained on, for a start from some of them; empty: not known.

    Raises:
        ConfigError: The words in the header have no token.
        DataError: An example has a label that the prefix does not know.
    """
    stored = prefix.header.get("initialization")
    if not isinstance(stored, dict) or "kind" not in stored:
        return None, "the file does not say what training started from."
    kind, text = stored["kind"], stored_text(stored)
    if not is_beginning(prefix.header.get("composition")):
        return None, "the prefix was cut at its start or joined after training: its positions are not its start's."
    if kind == "words" and text is None and "text" in stored:
        return None, "training started from words of which the file holds the beginning only."
    if kind == "words" and text is not None:
        # What a decoder-only model computes for the first words does not depend on those behind them.
        lengths = prefix.lengths if backbone.kind == "decoder" else _trained_lengths(prefix)
        start = None if lengths is None else from_words(backbone, text, lengths)[: prefix.prefix_length]
        if start is None or start.lengths != prefix.lengths:
            return None, "the prefix was cut after training, and the file does not say from which length."
        return _like(prefix, start), f"the words {text!r}"
    if kind == "examples":
        return _find_examples(backbone, prefix, stored, train)
    if kind == "random":
        return None, "training started from random numbers, which the file does not hold."
    return None, f"training started from {kind!r}, whose keys and values the file does not hold."


def is_beginning(composition: object) -> bool:
    """Whether a header says that the prefix is as it was trained, or the first positions of that."""
    if composition is None:
        return True
    if not isinstance(composition, Mapping) or composition.get("mode") != "cut" or composition.get("at") != "end":
        return False
    parts = composition.get("parts")
    return isinstance(parts, list) and not any(isinstance(part, Mapping) and "composition" in part for part in parts)


def _trained_lengths(prefix: Prefix) -> dict[Site, int] | None:
    """P of each site as it was trained, of a prefix that may have been cut at its end; None: it is not known."""
    composition = prefix.header.get("composition")
    if composition is None:
        return prefix.lengths
    part = next(iter(composition["parts"]), None)
    stored = part.get("prefix_length") if isinstance(part, Mapping) else None
    found = {site: stored.get(site) if isinstance(stored, Mapping) else None for site in prefix.sites}
    lengths = {site: length for site, length in found.items() if type(length) is int and 0 < length <= _MOST_WORDS}
    return lengths if len(lengths) == len(found) else None


def _like(prefix: Prefix, start: Prefix) -> Prefix:
    """The start with the prefix's header and head, in float32 on the CPU."""
    return Prefix(start.to(torch.float32, "cpu").layers, prefix.header, prefix.head)


def _find_examples(
    backbone: Backbone, prefix: Prefix, stored: Mapping[str, Any], train: Sequence[Example]
) -> tuple[Prefix | None, str]:
    """The start from solved examples, which the header names by index, where these are the examples that it means."""
    if not train:
        return None, "training started from some of its examples, which the file does not hold; give them: --train."
    if backbone.kind == "encoder-decoder" and "decoder" in prefix.sites:
        return None, "an encoder-decoder's decoder started from words that the file does not hold."
    indices, tokens, held = stored.get("examples"), stored.get("tokens"), stored.get("held_out")
    if isinstance(held, Mapping):
        share, seed = held.get("share"), held.get("seed")
        if type(share) is float and 0 < share < 1 and type(seed) is int and len(train) > 1:
            # They are counted among those that were left to train on.
            out = held_out_rows(train, share, seed)
            train = [example for example, is_out in zip(train, out, strict=True) if not is_out]
    other = "training started from examples that are not those of --train (in number, order or length)."
    if not are_counts(indices, most=len(train) - 1) or len(indices) > prefix.prefix_length:
        return None, other
    chosen = [train[index] for index in indices]
    labels, text_format = labels_of(prefix), format_of(backbone, prefix)
    if labels is not None:
        check_known(chosen, labels)
    if labels is not None and labels.by == "words":
        chosen = list(with_label_words(chosen, labels))
    if not chosen or not all(example.targets for example in chosen):
        return None, other
    rows = [(*prompt, *target) for prompt, target in encode_pairs(backbone, text_format, chosen)]
    lengths = stored.get("lengths")
    if [len(row) for row in rows] != tokens or not are_counts(lengths, most=max(map(len, rows))):
        return None, other
    if len(lengths) != len(rows) or any(not 1 <= kept <= len(row) for kept, row in zip(lengths, rows, strict=True)):
        return None, other
    # Counted before anything is computed: the header may say anything.
    if any(sum(lengths) != prefix.length(site) for site in prefix.sites):
        return None, "the prefix was cut or joined after training: its length is no longer that of its start."
    start = from_examples(backbone, rows, lengths=lengths)
    layers = {site: start.layers[site] for site in prefix.sites}
    return _like(prefix, Prefix(layers)), f"the training examples {', '.join(map(str, indices))}"


def are_counts(value: object, *, most: int) -> TypeGuard[list[int]]:
    """Whether a header's value is a list of whole numbers from 0 to `most`."""
    return isinstance(value, list) and all(type(one) is int and 0 <= one <= most for one in value)
