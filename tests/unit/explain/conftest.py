"""A tiny prefix with its backbone, rows and controls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import prefixtune as pt
import prefixtune.training.silence as silence
from prefixtune.backbone.prefixes import make_header
from prefixtune.explain.subject import Subject, make_subject
from prefixtune.prefix.prefix import Prefix

EXAMPLES = [pt.Example(f"n : {letter}", (f"{letter}{letter} it is.", "unused")) for letter in "abcdef"]


@pytest.fixture(autouse=True)
def few_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests about other things that tiny models take no time for."""
    monkeypatch.setattr(silence, "_requests", lambda: {"train": [], "test": ["Sing.", "Count to 3."]})


@pytest.fixture
def make(tiny_backbone: Callable[..., Any], random_prefix: Callable[..., Any]) -> Callable[..., Subject]:
    """A factory: `make("llama", length=4, examples=..., against=..., header=..., **limits)`."""

    def make(
        family: str | Any,
        *,
        length: int | dict[str, int] = 4,
        examples: Any = EXAMPLES,
        against: Prefix | None = None,
        prefix: Prefix | None = None,
        header: Any = None,
        **limits: Any,
    ) -> Subject:
        backbone = tiny_backbone(family) if isinstance(family, str) else family
        chosen = prefix or random_prefix(backbone, length, 1).detach()
        facts = {**make_header(backbone, task="records"), **(header or {})}
        whole = Prefix(chosen.layers, {**chosen.header, **facts}, chosen.head)
        return make_subject(backbone, whole, examples, against=against, **limits)

    return make
