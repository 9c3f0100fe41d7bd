"""The data of a run: examples that teach nothing are refused before the backbone loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prefixtune as pt
from prefixtune.data.tokenized import TokenizedExample
from prefixtune.errors import ConfigError, DataError
from prefixtune.training.schedule import count_steps, optimizer_steps


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


@pytest.mark.parametrize(
    ("counts", "batch_size", "accumulation"), [((1,) * 9, 4, 1), ((3, 1, 5), 4, 2), ((7, 2), 3, 3), ((0, 1), 9, 1)]
)
def test_the_steps_of_an_epoch_are_counted_without_planning_them(
    counts: tuple[int, ...], batch_size: int, accumulation: int
) -> None:
    config = pt.TrainConfig(batch_size=batch_size, gradient_accumulation=accumulation)
    plain = [TokenizedExample((1,), ((2,),) * count) for count in counts]
    assert count_steps(config, plain) == len(list(optimizer_steps(config, plain, epoch=0)))
    chats = [TokenizedExample((1,), ((2, 3, 4),), turns=((0, 1),) * count) for count in counts if count]
    assert count_steps(config, chats) == len(list(optimizer_steps(config, chats, epoch=0)))
