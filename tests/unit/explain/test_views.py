"""The views of a tiny prefix: what they find where the answer is known, what controls change, what is left out."""

import math

import pytest
import torch

import prefixtune as pt
from prefixtune.attention.record import prefix_from_tokens
from prefixtune.data.encoding import TEXT_FORMAT, encode_examples
from prefixtune.errors import DataError
from prefixtune.evaluation.evaluate import evaluate
from prefixtune.explain.ablation import loss_view, row_losses
from prefixtune.explain.attention import attention_view
from prefixtune.explain.description import UNRELATED, description_view
from prefixtune.explain.nearest import cosines, nearest_view
from prefixtune.explain.subject import random_like, shuffled
from prefixtune.prefix.text_format import TextFormat


def mean(losses):
    return float(losses[:, 0].sum() / losses[:, 1].sum())


@pytest.fixture
def wide(tiny_backbone):
    """A backbone that has room for questions."""
    return tiny_backbone("llama", max_position_embeddings=512)


# --- controls ---------------------------------------------------------------------------------------------------------


def test_a_random_prefix_has_the_same_norms_and_other_directions(make):
    prefix = make("llama").prefix
    random = random_like(prefix, 3)
    for one, other in zip(prefix.tensors(), random.tensors(), strict=True):
        assert torch.allclose(one.norm(dim=-1), other.norm(dim=-1), rtol=1e-5)
        assert torch.nn.functional.cosine_similarity(one, other, dim=-1).abs().max() < 0.999
    assert random.equal(random_like(prefix, 3))
    assert not random.equal(random_like(prefix, 4))


def test_shuffled_values_never_stay_with_their_keys(make):
    prefix = make("llama", length=5).prefix
    moved = shuffled(prefix, 0)
    for (key, value), (same, other) in zip(prefix.layers["decoder"], moved.layers["decoder"], strict=True):
        assert torch.equal(key, same)
        distances = torch.cdist(value.transpose(0, 1).flatten(1), other.transpose(0, 1).flatten(1))
        assert (distances.min(1).values < 1e-4).all()  # the same values, all of them
        assert (distances.diagonal() > 1e-3).all()
    assert shuffled(make("llama", length=1).prefix, 0) is None


# --- attention --------------------------------------------------------------------------------------------------------


def test_attention_adds_up_and_controls_change_it(make):
    subject = make("llama")
    numbers = attention_view(subject).numbers
    mass = numbers["sites"]["decoder"]
    matrix = torch.tensor(mass["by_layer_and_position"])
    assert matrix.shape == (3, 4)
    assert float(matrix.sum(1).mean()) == pytest.approx(mass["total"])
    assert 0 < mass["total_without_first"] < mass["total"] < 1
    totals = {name: each["decoder"]["total"] for name, each in numbers["controls"].items()}
    assert totals.keys() == {"random", "shuffled"}
    assert abs(totals["random"] - mass["total"]) > 1e-3


# --- losses -----------------------------------------------------------------------------------------------------------


def test_losses_of_parts(make):
    subject = make("llama")
    numbers = loss_view(subject).numbers
    whole, bare = row_losses(subject, subject.prefix), row_losses(subject, None)
    assert numbers["whole"]["loss"] == pytest.approx(mean(whole))
    assert numbers["without_prefix"]["change"] == pytest.approx(mean(bare) - mean(whole))
    low, high = numbers["without_prefix"]["interval"]
    assert low <= numbers["without_prefix"]["change"] <= high
    assert [part["first"] for part in numbers["positions"]] == [0, 1, 2, 3]
    assert all(part["change"] != 0 for part in numbers["positions"])
    assert len(numbers["layers"]) == sum(len(layers) for layers in subject.prefix.layers.values())
    assert all(part["change"] != 0 for part in numbers["layers"])
    assert numbers["controls"]["random"]["loss"] != pytest.approx(mean(whole))
    assert numbers["controls"]["shuffled"]["loss"] != pytest.approx(mean(whole))


def test_texts_are_read_in_the_windows_of_training_and_count_as_one_row_each(make, tiny_backbone):
    texts = [pt.Example("", ("the fox sleeps. " * 12,)), pt.Example("", ("an owl",)), pt.Example("", ("hare " * 20,))]
    header = {"text_format": {**TEXT_FORMAT.to_dict(), "max_length": 40}}
    subject = make("llama", examples=texts, header=header)
    made = encode_examples(tiny_backbone("llama"), texts, TEXT_FORMAT, prefix_length=4, max_length=40)
    assert subject.tokenized == made.examples
    losses = row_losses(subject, subject.prefix)
    assert losses[:, 1].tolist() == [len(text.targets[0]) + 1 for text in texts]
    scores = evaluate(subject.backbone, texts, subject.prefix).scores
    assert math.exp(mean(losses)) == pytest.approx(scores["perplexity"].score, rel=1e-4)
    few = make("llama", examples=texts, header=header, rows=3)
    assert (len(few.tokenized), len(few.examples)) == (3, 1)
    assert len(row_losses(few, few.prefix)) == 1, "windows of one text are one row"


def test_rows_are_as_long_as_in_training(make):
    long = [pt.Example("s" * 60, ("yes",)), pt.Example("s", ("no",))]
    form = {**TextFormat().to_dict(), "max_length": 40}
    subject = make("llama", examples=long, header={"text_format": {**form, "on_too_long": "cut"}})
    assert max(len(row.prompt) + len(row.targets[0]) for row in subject.tokenized) == 40
    with pytest.raises(DataError, match="example"):
        make("llama", examples=long, header={"text_format": {**form, "on_too_long": "error"}})


# --- nearest text -----------------------------------------------------------------------------------------------------


def test_a_prefix_of_a_text_is_nearest_to_that_text(make, tiny_backbone):
    backbone = tiny_backbone("llama")
    plain = make(backbone)
    ids = [*plain.tokenized[3].prompt, *plain.tokenized[3].targets[0]]
    text = prefix_from_tokens(backbone.model, backbone.layout, torch.tensor([ids[:6]]))
    assert torch.allclose(cosines(text, text).diagonal(), torch.ones(6), atol=1e-5)
    numbers = nearest_view(make(backbone, prefix=text)).numbers
    for row, token in zip(numbers["positions"], ids, strict=False):
        assert row["nearest"][0]["cosine"] == pytest.approx(1, abs=1e-4)
        assert row["nearest"][0]["token"] == backbone.tokenizer.decode([token])
        assert len({near["token"] for near in row["nearest"]}) == len(row["nearest"])
    assert numbers["mean_best"] > numbers["controls"]["random"] + 0.1


# --- description ------------------------------------------------------------------------------------------------------


def test_descriptions_are_scored_in_the_prefixs_place(make, wide):
    subject = make(wide)
    numbers = description_view(subject).numbers
    assert numbers["descriptions"].keys() == {"prefix", "bare", "random"}
    assert numbers["prefix_loss"] == pytest.approx(mean(row_losses(subject, subject.prefix)), rel=1e-5)
    assert numbers["unrelated"]["text"] == UNRELATED
    assert numbers["unrelated"]["loss"] != pytest.approx(numbers["bare_loss"])
    assert (numbers["unrelated"]["faithfulness"] is None) == (numbers["bare_loss"] - numbers["prefix_loss"] < 0.01)


def test_a_description_takes_no_room_from_rows_of_training_length(make, wide):
    longest = max(len(row.prompt) + len(row.targets[0]) for row in make(wide).tokenized)
    form = {**TextFormat().to_dict(), "max_length": longest, "on_too_long": "error"}
    limited, free = (description_view(make(wide, header=header)).numbers for header in ({"text_format": form}, None))
    assert limited["unrelated"]["loss"] == pytest.approx(free["unrelated"]["loss"])


def test_without_room_for_a_question_there_is_no_description(make):
    assert "no question fits" in description_view(make("llama", length=110)).left_out
