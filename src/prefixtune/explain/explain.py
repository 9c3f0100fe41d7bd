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
from prefixtune.explain.controls import make_controls
from prefixtune.explain.description import description_view
from prefixtune.explain.nearest import nearest_view
from prefixtune.explain.subject import OUT_OF_TIME, TITLES, Limits, Subject, View, make_subject
from prefixtune.prefix.prefix import Prefix

__all__ = ["explain", "summarize"]


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
    limits, whole, current = limits or Limits(), prefix.detach().to(torch.float32, "cpu"), [""]
    controls = make_controls(whole, against, limits.seed)
    subject = make_subject(backbone, whole, examples, controls, limits, lambda: on_part(current[0]))
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


def summarize(prefix: Prefix, backbone: Backbone, views: Sequence[View]) -> dict[str, Any]:
    """All numbers as JSON."""
    return {
        "backbone": backbone.name,
        "task": prefix.header.get("task"),
        "prefix_length": prefix.lengths,
        "views": {view.name: view.to_dict() for view in views},
    }
