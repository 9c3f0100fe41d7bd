"""All views of a prefix, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.data.examples import Example
from prefixtune.errors import PrefixError
from prefixtune.explain.ablation import loss_view
from prefixtune.explain.attention import attention_view
from prefixtune.explain.controls import random_like, shuffled
from prefixtune.explain.description import description_view
from prefixtune.explain.nearest import nearest_view
from prefixtune.explain.subject import Limits, Subject, make_subject
from prefixtune.explain.view import OUT_OF_TIME, TITLES, View
from prefixtune.prefix.prefix import Prefix

__all__ = ["explain", "make_controls", "summarize"]


_MAKERS: Mapping[str, Callable[[Subject], View]] = {
    "attention": attention_view,
    "loss": loss_view,
    "nearest": nearest_view,
    "description": description_view,
}


def explain(
    backbone: Backbone,
    prefix: Prefix,
    examples: Sequence[Example] = (),
    *,
    against: Prefix | None = None,
    limits: Limits | None = None,
    views: Sequence[str] = tuple(TITLES),
    on_part: Callable[[str], None] = lambda name: None,
) -> Iterator[View]:
    """Look at a prefix in several ways, and yield each view as it is done.

    Args:
        backbone: The frozen model.
        prefix: What is explained; checked against the backbone before.
        examples: Rows that it is run on; empty: views that need any are left out, by name.
        against: A prefix of another task on the same backbone, as a control.
        limits: How much is computed; None: the default.
        views: Their names, of `TITLES`.
        on_part: Called with a view's name as it begins, and after each part of it.

    Raises:
        DataError: An example is wrong, or too long.
        CheckpointError: The text format in the prefix's header cannot be used.
    """
    limits = limits or Limits()
    whole = prefix.detach().to(torch.float32, "cpu")
    current = [""]
    subject = make_subject(
        backbone,
        whole,
        examples,
        make_controls(whole, against, limits.seed),
        limits,
        lambda: on_part(current[0]),
    )
    for name in views:
        current[0] = name
        on_part(name)
        if subject.out_of_time():
            yield View(name, left_out=OUT_OF_TIME)
            continue
        try:
            yield _MAKERS[name](subject)
        except PrefixError as error:
            yield View(name, left_out=str(error))


def make_controls(prefix: Prefix, against: Prefix | None, seed: int) -> dict[str, Prefix]:
    """Prefixes to compare with, by name: `random`, `shuffled` (from two positions on), `other` (if one is given)."""
    prefix = prefix.to(torch.float32, "cpu")
    controls = {"random": random_like(prefix, seed)}
    moved = shuffled(prefix, seed)
    if moved is not None:
        controls["shuffled"] = moved
    if against is not None:
        other = against.to(torch.float32, "cpu")
        controls["other"] = Prefix(other.layers, other.header, prefix.head)
    return controls


def summarize(prefix: Prefix, backbone: Backbone, views: Sequence[View]) -> dict[str, Any]:
    """All numbers as JSON."""
    return {
        "backbone": backbone.name,
        "task": prefix.header.get("task"),
        "prefix_length": prefix.lengths,
        "views": {view.name: view.to_dict() for view in views},
    }
