"""Examples -> token ids -> packed rows: what is cut, what never is, where a label stands, and an epoch's order."""

import pytest

from prefixtune.data import Example
from prefixtune.data.batching import pack
from prefixtune.data.encoding import DEFAULT_WINDOW, TEXT_FORMAT, TokenizedExample, encode_examples
from prefixtune.errors import DataError
from prefixtune.prefix.text_format import TextFormat

PLAIN = TextFormat("{source}{separator}", "{target}")


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


# --- long texts ------------------------------------------------------------------------------------------------------


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
