"""The model card of a prefix: what the hub reads of it, and what people see."""

import dataclasses
from html import escape

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from prefixtune.backbone.prefixes import make_header
from prefixtune.errors import ConfigError
from prefixtune.prefix.hub import read_evaluations
from prefixtune.prefix.prefix import Prefix

SCORES = {"bleu": {"score": 60.3338, "implementation": "sacrebleu 2.6.0", "interval": [58.516, 62.131]}}
EVALUATION = {"kind": "evaluation", "task": "e2e", "data": "e2e", "split": "test", "num_examples": 300}
EVALUATION |= {"scores": SCORES}


@pytest.fixture
def prefix(tiny_backbone, random_prefix):
    backbone = dataclasses.replace(tiny_backbone("llama"), name="meta-llama/Llama-3.2-1B")
    training = {"steps": 9, "num_targets": 5, "dataset": "GEM/e2e_nlg"}
    header = make_header(backbone, task="e2e", license="CC-BY-4.0", training=training)
    return Prefix(random_prefix(backbone, 4).layers, header)


def test_the_hub_reads_it(prefix):
    text = prefix.card("me/pubs", EVALUATION)
    card = ModelCard(text)
    assert card.data.base_model == "meta-llama/Llama-3.2-1B"
    assert card.data.base_model_relation == "adapter"
    assert card.data.library_name == "prefixtune"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.license == "cc-by-4.0"
    assert card.data.datasets == ["GEM/e2e_nlg"]
    assert {"prefix-tuning", "e2e"} <= set(card.data.tags)
    assert card.data.model_name == "pubs"
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("bleu", 60.3338, "test")
    assert (result.dataset_type, result.dataset_name, result.task_type) == ("e2e", "e2e", "text-generation")
    # What the hub's library writes again is what it read.
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    assert "| bleu | 60.33 | 58.52 to 62.13 | sacrebleu 2.6.0 |" in text
    assert f"{prefix.num_parameters:,}" in text
    assert "--prefix hub:me/pubs " in text


@pytest.mark.parametrize("name", ["/home/somebody/models", "a/b/somebody", "models/somebody"])
def test_it_names_no_folder_of_a_machine(name, prefix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/somebody").mkdir(parents=True)
    prefix.header["backbone"]["name"] = name
    text = prefix.card("me/pubs")
    assert "somebody" not in text
    assert "base_model" not in text
    assert "model-index" not in text


def test_a_header_makes_no_link_and_no_picture(prefix):
    words = "![a](http://evil/a.png) [b](http://evil) <img src=c> **d** `e` \\[f](http://evil)"
    prefix.header["task"] = prefix.header["training"]["dev_loss"] = words
    page = MarkdownIt("commonmark").enable("table").render(ModelCard(prefix.card("me/pubs")).text)
    assert page.count(f"<td>{escape(words)}</td>") == 2
    assert "<img" not in page
    assert "<a " not in page


@pytest.mark.parametrize(
    "wrong",
    [
        {**EVALUATION, "kind": "run"},
        {**EVALUATION, "scores": {"bleu": {"score": "high", "implementation": ""}}},
        {**EVALUATION, "num_examples": float("inf")},
        "no/such/folder",
    ],
)
def test_what_holds_no_scores_is_refused(wrong):
    with pytest.raises(ConfigError):
        read_evaluations(wrong)
