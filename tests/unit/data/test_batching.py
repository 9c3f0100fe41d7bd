"""Examples -> token ids -> packed rows: what is cut, what never is, and where a label stands."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prefixtune.attention.packing import sees
from prefixtune.data import Example
from prefixtune.data.batching import pack, pad
from prefixtune.data.encoding import TokenizedExample, encode_examples, encode_prompts
from prefixtune.errors import DataError
from prefixtune.prefix.text_format import TextFormat

PLAIN = TextFormat("{source}{separator}", "{target}")


@pytest.fixture
def llama(tiny_backbone: Any) -> Any:
    return tiny_backbone("llama")


def encode(backbone: Any, *examples: Example, **options: Any) -> Any:
    return encode_examples(backbone, examples, options.pop("text_format", PLAIN), **{"prefix_length": 10, **options})


def test_the_text_format_surrounds_source_and_targets(llama: Any):
    encoding = encode(llama, Example("ab", ("c", "de")), text_format=TextFormat())
    (example,) = encoding.examples
    assert example.prompt == tuple(llama.encode(" ab <s>"))
    assert example.prompt[-1] == llama.tokenizer.bos_token_id
    assert example.targets == ((*llama.encode(" c "), llama.eos_id), (*llama.encode(" de "), llama.eos_id))
    assert (encoding.num_targets, encoding.num_truncated) == (2, 0)
    assert encode_prompts(llama, TextFormat(), ["ab"])[0] == list(example.prompt)


def test_a_long_source_is_truncated_at_its_end_and_keeps_the_rest_of_the_prompt(llama: Any):
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


def test_the_prefix_takes_its_positions(llama: Any):
    limit = llama.max_positions
    fits = Example("a" * (limit - 10 - 1 - 4), ("xyz",))
    assert encode(llama, fits).num_truncated == 0
    assert encode(llama, fits, prefix_length=11).num_truncated == 1
    assert encode(llama, fits, max_length=10 * limit).num_truncated == 0
    with pytest.raises(DataError):
        encode(llama, fits, prefix_length=limit)


def test_truncation_can_be_refused(llama: Any):
    with pytest.raises(DataError, match="example 2"):
        encode(llama, Example("a", ("x",)), Example("abcdefgh", ("xyz",)), max_length=12, on_too_long="error")


def test_a_target_is_never_truncated(llama: Any):
    with pytest.raises(DataError, match="example 1"):
        encode(llama, Example("a", ("x" * 12,)), max_length=12)
    (example,) = encode(llama, Example("abcdefgh", ("x" * 9,)), max_length=12).examples
    assert len(example.targets[0]) == 10
    assert llama.decode(list(example.prompt)) == "a"


def test_examples_without_targets_are_refused(llama: Any):
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


def test_weights_reduce_over_the_whole_step():
    batch = pack([TokenizedExample((1, 2), ((4, 5), (6,)))])
    # A step of 8 targets and 40 tokens, of which this row is a part.
    assert batch.weights("sentence", 8, 40).tolist() == pytest.approx([1 / 8] * 3)
    assert batch.weights("token", 8, 40).tolist() == pytest.approx([1 / 40] * 3)


def test_an_empty_prompt_predicts_nothing():
    with pytest.raises(DataError):
        pack([TokenizedExample((), ((1,),))])


def test_padded_rows_say_what_each_does_not_see_of_the_prefix():
    """One row per target, so a source's hidden positions are those of each of its rows."""
    examples = [TokenizedExample((1, 2), ((3,), (4, 5)), hidden=(0, 1)), TokenizedExample((6,), ((7,),))]
    assert pad(examples, pad_id=0).hidden == ((0, 1), (0, 1), ())
    assert pad(examples, pad_id=0, decoder_start_id=9).hidden == ((0, 1), ())
    assert pad(examples[1:], pad_id=0).hidden is None
