"""Examples -> token ids -> packed rows: what is cut, what never is, where a label stands, and an epoch's order."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefixtune.attention.packing import sees
from prefixtune.data import Example
from prefixtune.data.batching import pack
from prefixtune.data.encoding import DEFAULT_WINDOW, TEXT_FORMAT, TokenizedExample, encode_examples, text_windows
from prefixtune.data.tokenized import epoch_batches
from prefixtune.errors import DataError
from prefixtune.prefix.text_format import TextFormat

PLAIN = TextFormat("{source}{separator}", "{target}")


@pytest.fixture
def llama(tiny_backbone):
    return tiny_backbone("llama")


def encode(backbone, *examples, **options):
    return encode_examples(backbone, examples, options.pop("text_format", PLAIN), **{"prefix_length": 10, **options})


def test_a_long_source_is_truncated_at_its_end_and_keeps_the_rest_of_the_prompt(llama):
    text_format = TextFormat("<{source}>>{separator}", "{target}")
    # A room of 12 positions: 4 for the longest target and its end, 3 for ">><s>", so 5 for what stands before.
    encoding = encode(
        llama, Example("abcdefgh", ("x", "xyz")), Example("abc", ("x",)), max_length=12, text_format=text_format
    )
    long, short = encoding.examples
    assert llama.decode(list(long.prompt)) == "<abcd>>"
    assert long.prompt[-1] == llama.tokenizer.bos_token_id
    assert len(long.prompt) + max(map(len, long.targets)) == 12
    assert short.prompt == tuple(llama.encode("<abc>><s>"))
    assert encoding.num_truncated == 1


def test_the_prefix_takes_its_positions(llama):
    limit = llama.max_positions
    fits = Example("a" * (limit - 10 - 1 - 4), ("xyz",))
    assert encode(llama, fits).num_truncated == 0
    assert encode(llama, fits, prefix_length=11).num_truncated == 1
    assert encode(llama, fits, max_length=10 * limit).num_truncated == 0
    with pytest.raises(DataError):
        encode(llama, fits, prefix_length=limit)


def test_truncation_can_be_refused(llama):
    with pytest.raises(DataError, match="example 2"):
        encode(llama, Example("a", ("x",)), Example("abcdefgh", ("xyz",)), max_length=12, on_too_long="error")


def test_a_target_is_never_truncated(llama):
    with pytest.raises(DataError, match="example 1"):
        encode(llama, Example("a", ("x" * 12,)), max_length=12)
    (example,) = encode(llama, Example("abcdefgh", ("x" * 9,)), max_length=12).examples
    assert len(example.targets[0]) == 10
    assert llama.decode(list(example.prompt)) == "a"


def test_examples_without_targets_are_refused(llama):
    with pytest.raises(DataError):
        encode(llama)
    with pytest.raises(DataError, match="example 2"):
        encode(llama, Example("a", ("x",)), Example("b"))


def test_a_packed_row_opens_each_target_with_the_sources_last_token():
    batch = pack([TokenizedExample((1, 2, 3), ((4, 5), (6,))), TokenizedExample((7,), ((8, 9),))])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 3, 7, 8]]
    assert batch.label_positions.tolist() == [2, 3, 4, 5, 6]
    assert batch.labels.tolist() == [4, 5, 6, 8, 9]
    assert batch.target_index.tolist() == [0, 0, 1, 2, 2]
    assert batch.packing.positions().tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    assert batch.num_targets == 3
    rows = torch.arange(5)
    first = sees(batch.packing.visibility("decoder", [0], None), rows[:, None], rows[None])
    assert first.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    windowed = sees(batch.packing.visibility("decoder", [0], 2), rows[:, None], rows[None])
    assert windowed.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 1, 0, 0, 1],
    ]


# --- the order of an epoch -------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4)), min_size=1, max_size=30),
    st.integers(1, 6),
    st.integers(0, 3),
)
def test_conversations_are_never_divided_and_count_as_their_turns(examples, batch_size, seed):
    rows = [
        TokenizedExample((number,), ((1,) * turns,), turns=tuple((n, n + 1) for n in range(turns)))
        if turns
        else TokenizedExample((number,), tuple((target,) for target in range(count)))
        for number, (turns, count) in enumerate(examples)
    ]
    batches = list(epoch_batches(rows, batch_size=batch_size, targets_per_source=2, seed=seed))
    seen = [(one.prompt, target) for batch in batches for one in batch for target in one.targets]
    assert sorted(seen) == [(row.prompt, target) for row in rows for target in row.targets]
    for batch in batches:
        assert 1 <= sum(one.num_targets for one in batch) <= batch_size or len(batch) == 1


# --- long texts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 8, 9, 65])
@pytest.mark.parametrize("limit", [2, 3, 8])
def test_every_token_is_a_label_once_after_the_ones_before_it(length, limit):
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


def test_a_text_alone_follows_the_token_that_begins_texts_and_ends_with_the_end_token(default_backbone):
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
