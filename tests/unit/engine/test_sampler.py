"""What a token is drawn from, and what a row without one says."""

import gc
import math
from collections import Counter

import pytest
import torch

from engine_runs import EvenNumbers, drawn, sequence
from prefixtune.engine import sampler
from prefixtune.engine.request import Request, SamplingParams, Token
from prefixtune.engine.sampler import sample
from prefixtune.engine.sequence import TokenSequence
from prefixtune.sampling.detokenizer import Detokenizer

LOGITS = [math.log(p) for p in (0.4, 0.05, 0.3, 0.2, 0.05)]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"temperature": 1.0}, {0: 0.4, 1: 0.05, 2: 0.3, 3: 0.2, 4: 0.05}),
        ({"temperature": 0.5}, {0: 16 / 29.5, 1: 0.25 / 29.5, 2: 9 / 29.5, 3: 4 / 29.5, 4: 0.25 / 29.5}),
        ({"temperature": 1.0, "top_k": 2}, {0: 4 / 7, 2: 3 / 7}),
        # The first that reaches 0.75 stays: 0.4 + 0.3 do not, 0.4 + 0.3 + 0.2 do.
        ({"temperature": 1.0, "top_p": 0.75}, {0: 4 / 9, 2: 3 / 9, 3: 2 / 9}),
        ({"temperature": 1.0, "min_p": 0.45}, {0: 4 / 9, 2: 3 / 9, 3: 2 / 9}),
        # Of the four likeliest, 0.4 + 0.3 are less than 0.75; what min_p leaves out counts in their sum.
        ({"temperature": 1.0, "top_k": 4, "top_p": 0.75, "min_p": 0.3}, {0: 4 / 9, 2: 3 / 9, 3: 2 / 9}),
        ({"temperature": 1.0, "logit_bias": {0: -100, 4: math.log(4)}}, {1: 1 / 15, 2: 6 / 15, 3: 4 / 15, 4: 4 / 15}),
        ({"temperature": 1.0, "banned": (0, 2)}, {1: 1 / 6, 3: 4 / 6, 4: 1 / 6}),
        ({"temperature": 1.0, "min_new_tokens": 1}, {1: 1 / 12, 2: 6 / 12, 3: 4 / 12, 4: 1 / 12}),
        ({"temperature": 0.0}, {0: 1.0}),
    ],
)
def test_tokens_come_as_often_as_they_should(rules, expected):
    count = 1000
    found = drawn(LOGITS, count, evenly=True, **rules)
    assert found.keys() == expected.keys()
    for token, share in expected.items():
        assert abs(found[token] - count * share) <= EvenNumbers.WITHIN


def test_numbers_that_are_not_finite_are_that_rows_trouble():
    logits = torch.tensor([[1.0, 2.0], [1.0, float("nan")], [float("inf"), 0.0], [float("-inf"), 3.0], [3.0, 1.0]])
    asked = [sequence() for _ in logits]
    found = sample(logits, asked, eos_id=0)
    assert [token.id if isinstance(token, Token) else None for token in found] == [1, None, None, 1, 0]
    assert "finite" in str(found[1])


def test_texts_without_a_seed_differ():
    row = torch.zeros(1, 1000)
    found = {sample(row, [sequence(seed=None, temperature=1.0)], eos_id=0)[0] for _ in range(5)}
    assert len(found) > 1


def test_each_token_of_a_text_is_counted_once(monkeypatch):
    """Of a long text, a step reads the new token alone, and what runs beside changes nothing."""
    moved, size = [], 40
    on_device = sampler._on
    monkeypatch.setattr(sampler, "_on", lambda numbers, *args: moved.append(len(numbers)) or on_device(numbers, *args))
    generator = torch.Generator().manual_seed(1)
    rules = {"repetition_penalty": 1.5, "presence_penalty": 0.4, "frequency_penalty": 0.6}
    sampling = SamplingParams(seed=5, **rules)
    text = TokenSequence(Request(tuple(range(20)), None, sampling), 0, Detokenizer(str))
    for step in range(12):
        logits = torch.randn(2, size, generator=generator)
        scores = logits[0].clone()
        for token in {*text.token_ids}:
            scores[token] = scores[token] / 1.5 if scores[token] > 0 else scores[token] * 1.5
        for token, count in Counter(text.token_ids[20:]).items():
            scores[token] -= 0.6 * count + 0.4
        moved.clear()
        beside = sequence(frequency_penalty=1.0)
        token, _ = sample(logits, [text, beside], eos_id=size - 1)
        assert token.id == int(scores.argmax())
        assert max(moved) == (20 if step == 0 else 1)
        text.token_ids.append(token.id)
    del text, beside
    gc.collect()
    assert not sampler._TOKENS
