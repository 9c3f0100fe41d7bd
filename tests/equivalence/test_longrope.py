"""LongRoPE: a text beyond the model's original length is not computed with shorter ones."""

import pytest
import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.loss import batch_loss
from prefixtune.data.batching import pack, pad
from prefixtune.data.encoding import TokenizedExample
from prefixtune.data.examples import Example
from prefixtune.engine.engine import TorchEngine
from prefixtune.engine.request import Request, SamplingParams
from prefixtune.errors import ConfigError, ContextLengthError, RequestError
from prefixtune.evaluation.evaluate import evaluate
from prefixtune.inference.classify import classify
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate, generate_ids
from prefixtune.prefix.text_format import TextFormat
from zoo import make_model

LIMIT = 40


@pytest.fixture(scope="module")
def phi3(tiny_tokenizer):
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": LIMIT, **factors}
    model = make_model("phi3", tiny_tokenizer, rope_parameters=rope, original_max_position_embeddings=LIMIT)
    return Backbone.from_model(model, tiny_tokenizer, "tiny-longrope")


@pytest.fixture
def prefix(phi3, random_prefix):
    return random_prefix(phi3, 5, 3).detach()


def test_generated_texts(phi3, prefix, random_ids):
    config = GenerateConfig(max_new_tokens=8, min_new_tokens=8)
    # The second one becomes too long on the way.
    prompts = [random_ids(count, seed=count) for count in (20, 36, 12, 60, 50)]
    prefixes = [prefix, None, None, None, None]
    alone = [generate_ids(phi3, [ids], [one], config=config)[0] for ids, one in zip(prompts, prefixes, strict=True)]
    assert generate_ids(phi3, prompts, prefixes, config=config) == alone


@pytest.mark.parametrize("collate", [pack, lambda examples: pad(examples, pad_id=0)], ids=["packed", "padded"])
def test_losses(collate, phi3, prefix, random_ids, assert_same):
    short, long = (
        [TokenizedExample(tuple(random_ids(n, seed=n)), (tuple(random_ids(4, seed=n + 100)),) * 2) for n in counts]
        for counts in ((20, 3), (60, 50))
    )
    for examples in (short, long):
        alone = [batch_loss(phi3, None, collate([example])) for example in examples]
        assert_same(batch_loss(phi3, None, collate(examples)), torch.cat(alone))
    for front in (prefix, None):
        with pytest.raises(ConfigError, match="original length of 40"):
            batch_loss(phi3, front, collate([*short, *long]))


@pytest.mark.parametrize("task", ["classify", "evaluate"])
def test_labels_of_texts_on_both_sides_are_refused_before_any_work(task, phi3, monkeypatch):
    texts = ["x" * 10, "x" * 60]
    examples = [Example(text, (name,)) for text, name in zip(texts, ("yes", "no"), strict=True)]
    work = {
        "classify": lambda: classify(phi3, texts, labels=["yes", "no"], batch_size=1),
        "evaluate": lambda: evaluate(phi3, examples, kind="classification", batch_size=1),
    }
    monkeypatch.setattr(phi3.model, "forward", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(RequestError, match=r"text 2 .* text 1 "):
        work[task]()


def test_texts_alone_are_read_in_windows_of_the_original_length(phi3):
    texts = [Example("", ("x" * count,)) for count in (10, 3 * LIMIT)]
    whole = evaluate(phi3, texts, max_total_length=2 * LIMIT)
    assert whole.scores == evaluate(phi3, texts, max_total_length=LIMIT).scores


def test_a_prefix_is_for_the_original_length(phi3, prefix, random_ids):
    ids = random_ids(30)
    assert len(generate_ids(phi3, [ids], [prefix], config=GenerateConfig(max_new_tokens=5))[0]) == 5
    with pytest.raises(RequestError, match=r"5 \D+30 \D+6 .* 40\b"):
        generate_ids(phi3, [ids], [prefix], config=GenerateConfig(max_new_tokens=6))
    # A long source is cut to it.
    form = TextFormat(max_length=100, on_too_long="cut")
    with pytest.warns(UserWarning, match="1 of 1 sources were truncated"):
        generate(phi3, ["x" * 60], prefix, text_format=form, max_new_tokens=5)


def test_the_engine_is_for_the_original_length(phi3, random_ids):
    engine = TorchEngine(phi3)
    assert engine.max_length == LIMIT
    with pytest.raises(ContextLengthError):
        engine.add(Request(tuple(random_ids(40)), sampling=SamplingParams(max_new_tokens=2)))
    with pytest.raises(ContextLengthError):
        TorchEngine(phi3, max_length=20).add(Request(tuple(random_ids(40)), sampling=SamplingParams(max_new_tokens=2)))
