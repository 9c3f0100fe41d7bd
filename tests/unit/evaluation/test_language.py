"""Perplexity of texts: equal to transformers' own loss, window by window."""

import math
from dataclasses import replace

import pytest
import torch

from prefixtune.data.encoding import TEXT_FORMAT
from prefixtune.data.examples import Example
from prefixtune.errors import ConfigError
from prefixtune.evaluation.evaluate import evaluate

TEXTS = ["the pub is near the river", "it rained", "a long walk by the river " * 4]


@pytest.fixture
def model(tiny_backbone):
    return tiny_backbone("llama")


def test_the_perplexity_of_texts_is_that_of_transformers(model):
    outcome = evaluate(model, [{"text": text} for text in TEXTS])
    losses, tokens = [], []
    for text in TEXTS:
        ids = torch.tensor([[*model.encode(model.separator), *model.encode(text), model.eos_id]])
        with torch.no_grad():
            loss = model.model(input_ids=ids, labels=ids).loss
        tokens.append(ids.shape[1] - 1)
        losses.append(float(loss) * tokens[-1])
    assert outcome.scores["perplexity"].score == pytest.approx(math.exp(sum(losses) / sum(tokens)), rel=1e-4)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert outcome.scores["bits_per_byte"].score == pytest.approx(sum(losses) / math.log(2) / num_bytes, rel=1e-4)
    assert outcome.outputs[1].endswith(f"of {tokens[1]} tokens")
    assert not outcome.scores["perplexity"].higher_is_better


def test_a_long_text_counts_every_token_once_and_a_batch_changes_nothing(model):
    long = Example("", (" ".join(TEXTS * 60),))
    seen = []
    alone = evaluate(model, [long]).scores["perplexity"].score
    both = evaluate(model, [long, Example("", ("it rained",)), long], on_batch=seen.append, intervals=True)
    assert seen[-1] == 3
    assert seen == sorted(seen)
    low, high = both.scores["perplexity"].interval or (0, 0)
    assert low <= both.scores["perplexity"].score <= high
    assert both.outputs[0] == both.outputs[2] == f"perplexity {alone:.3f} of {both.outputs[0].split()[-2]} tokens"


def test_max_length_is_that_of_the_windows(model):
    text = {"text": " ".join(TEXTS)}
    whole, short = (evaluate(model, [text], max_total_length=length).scores for length in (0, 16))
    stored = evaluate(model, [text], text_format=replace(TEXT_FORMAT, max_length=16)).scores
    assert short["perplexity"].score == stored["perplexity"].score != whole["perplexity"].score
    assert short["bits_per_byte"].implementation.endswith("windows of 16 positions")
    assert whole["perplexity"].implementation.endswith(f"windows of {model.max_positions} positions")


def test_an_encoder_decoder_cannot_go_on_with_a_text(tiny_backbone):
    with pytest.raises(ConfigError):
        evaluate(tiny_backbone("t5"), [{"text": "it rained"}])
