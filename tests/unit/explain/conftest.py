"""A tiny prefix with its backbone, rows and controls."""

import pytest

import prefixtune as pt
import prefixtune.training.silence as silence
from prefixtune.backbone.prefixes import make_header
from prefixtune.explain.subject import make_subject
from prefixtune.prefix.prefix import Prefix

EXAMPLES = [pt.Example(f"n : {letter}", (f"{letter}{letter} it is.", "unused")) for letter in "abcdef"]


@pytest.fixture(autouse=True)
def few_requests(monkeypatch):
    """Requests about other things that tiny models take no time for."""
    monkeypatch.setattr(silence, "general_requests", lambda: {"train": [], "test": ["Sing.", "Count to 3."]})


@pytest.fixture
def make(tiny_backbone, random_prefix):
    """A factory: `make("llama", length=4, examples=..., against=..., header=..., **limits)`."""

    def make(family, *, length=4, examples=EXAMPLES, against=None, prefix=None, header=None, **limits):
        backbone = tiny_backbone(family) if isinstance(family, str) else family
        chosen = prefix or random_prefix(backbone, length, 1).detach()
        facts = {**make_header(backbone, task="records"), **(header or {})}
        whole = Prefix(chosen.layers, {**chosen.header, **facts}, chosen.head)
        return make_subject(backbone, whole, examples, against=against, **limits)

    return make
