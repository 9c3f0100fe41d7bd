"""Long texts in windows: every token is a label once, after as much of the text before it as the window holds."""

from __future__ import annotations

import pytest

from prefixtune.backbone.backbone import Backbone
from prefixtune.data.encoding import DEFAULT_WINDOW, TEXT_FORMAT, encode_examples, text_windows
from prefixtune.data.examples import Example
from prefixtune.errors import DataError


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 50, 64, 65])
@pytest.mark.parametrize("limit", [2, 3, 8, 64])
def test_every_token_is_a_label_once_after_the_ones_before_it(length: int, limit: int) -> None:
    text = list(range(1, length + 1))
    windows = text_windows([0], text, limit)
    assert [token for window in windows for token in window.targets[0]] == text
    assert windows[0].prompt == (0,)
    for window in windows:
        assert len(window.prompt) + len(window.targets[0]) <= limit
    for window in windows[1:]:
        first = window.targets[0][0]
        assert window.prompt == tuple(range(first - len(window.prompt), first))
        assert len(window.prompt) >= max(1, limit // 4)


def test_a_window_without_room_is_refused() -> None:
    with pytest.raises(DataError):
        text_windows([0, 0, 0], [1], 3)


def test_a_text_alone_follows_the_token_that_begins_texts_and_ends_with_the_end_token(
    default_backbone: Backbone,
) -> None:
    text = "  def f(x):\n      return x\n"
    (example,) = encode_examples(default_backbone, [Example("", (text,))], TEXT_FORMAT, prefix_length=10).examples
    assert example.prompt == tuple(default_backbone.encode(default_backbone.separator))
    assert example.targets == ((*default_backbone.encode(text), default_backbone.eos_id),)

    long = Example("", ("It rained again. " * 400,))
    windows = encode_examples(default_backbone, [long, long], TEXT_FORMAT, prefix_length=10)
    ids = (*default_backbone.encode(long.targets[0]), default_backbone.eos_id)
    assert tuple(token for one in windows.examples for token in one.targets[0]) == ids * 2
    assert max(len(one.prompt) + len(one.targets[0]) for one in windows.examples) == DEFAULT_WINDOW
    assert windows.num_truncated == 0
    shorter = encode_examples(default_backbone, [long], TEXT_FORMAT, prefix_length=10, max_length=100)
    assert max(len(one.prompt) + len(one.targets[0]) for one in shorter.examples) == 100
