"""Fixtures of several equivalence tests."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from engine_runs import DECODERS_OF_THE_ZOO, ENCODER_DECODERS_OF_THE_ZOO
from prefixtune.backbone.backbone import Backbone
from zoo import ZOO, make_model


@pytest.fixture(scope="module")
def made(tiny_backbone: Callable[..., Any], tiny_tokenizer: Any) -> Callable[[str], Backbone]:
    """Tiny backbones by family, of the usual ones or of the zoo, each made once."""

    @functools.cache
    def make(name: str) -> Backbone:
        if name in (*DECODERS_OF_THE_ZOO, *ENCODER_DECODERS_OF_THE_ZOO):
            return Backbone.from_model(make_model(ZOO[name].name, tiny_tokenizer), tiny_tokenizer, f"tiny-{name}")
        backbone: Backbone = tiny_backbone(name)
        return backbone

    return make
