"""All views of a prefix, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prefixtune.errors import PrefixError
from prefixtune.explain.ablation import loss_view
from prefixtune.explain.attention import attention_view
from prefixtune.explain.description import description_view, general_view
from prefixtune.explain.nearest import nearest_view
from prefixtune.explain.subject import TITLES, Subject, View

_MAKERS: Mapping[str, Callable[[Subject], View]] = {
    "attention": attention_view,
    "loss": loss_view,
    "nearest": nearest_view,
    "description": description_view,
    "general": general_view,
}


def explain(subject: Subject, views: Sequence[str] = tuple(TITLES)) -> Iterator[View]:
    """Look at a prefix in several ways, and yield each view as it is done.

    Args:
        subject: The prefix with its rows and controls, as `make_subject` makes it.
        views: Their names, of `TITLES`.
    """
    for name in views:
        try:
            yield _MAKERS[name](subject)
        except PrefixError as error:
            yield View(name, left_out=str(error))


def summarize(subject: Subject, views: Sequence[View]) -> dict[str, Any]:
    """All numbers as JSON."""
    return {
        "backbone": subject.backbone.name,
        "task": subject.prefix.header.get("task"),
        "prefix_length": subject.prefix.lengths,
        "views": {view.name: view.to_dict() for view in views},
    }
