"""The data of a run: examples that teach nothing are refused before the backbone loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prefixtune as pt
from prefixtune.errors import ConfigError, DataError


def test_data_without_a_target_is_refused_before_the_backbone_loads(
    train: Callable[..., Any], tmp_path: Path, no_backbone_loads: None
) -> None:
    bare = [pt.Example("a", ()), pt.Example("b", ())]
    with pytest.raises(DataError, match="the training data has 2 examples, and none has a target"):
        train(examples=bare)
    with pytest.raises(DataError, match="the development data has 2 examples, and none has a target"):
        train(dev_examples=bare)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [{"classifier": "head"}, {"label_words": "a=b"}])
def test_options_of_classification_are_refused_where_texts_are_generated(
    options: dict[str, str], train: Callable[..., Any], no_backbone_loads: None
) -> None:
    with pytest.raises(ConfigError, match="records"):
        train(**options)
