"""Every kind of model and prefix gets every view, or the reason why not; what is found fits page and JSON.

Slow: the views of an encoder-decoder have three sites.
"""

import json

import pytest
import torch

import prefixtune as pt
from prefixtune.backbone.backbone import Backbone
from prefixtune.explain.explain import explain, summarize
from prefixtune.explain.page import compose
from prefixtune.explain.subject import TITLES, make_subject
from prefixtune.pages.page import to_html
from prefixtune.prefix.prefix import Head, Prefix
from zoo import make_model

WORDS = {"initialization": {"kind": "words", "text": "some words"}}
HEAD = {"labels": {"kind": "classification", "by": "head", "names": ["x", "y"], "words": []}}
LABEL_WORDS = {"labels": {"kind": "classification", "by": "words", "names": ["x", "y"], "words": ["yes", "no"]}}


def shown(views):
    for view in views:
        json.dumps(view.to_dict(), allow_nan=False)
    page = to_html(compose(views, [("prefix", "p")], "Page"))
    assert all(f">{TITLES[view.name]}" in page for view in views if not view.left_out and view.name != "description")


@pytest.mark.parametrize(
    ("family", "header", "left_out"),
    [
        ("bart", WORDS, {}),
        ("llama", {**WORDS, **LABEL_WORDS}, {"general": "gives labels"}),
        ("jamba", WORDS, {}),  # takes padded rows only
        ("gemma3n_text", WORDS, {}),  # layers that share keys and values
        ("bert", {**WORDS, **HEAD}, {"description": "trained head", "general": "gives labels"}),
        (
            "deberta-v2",
            {**WORDS, **HEAD},
            {"description": "trained head", "attention": "computes its weights itself", "general": "gives labels"},
        ),
    ],
    ids=["bart", "words", "padded", "shared", "head", "disentangled"],
)
def test_kinds(family, header, left_out, tiny_tokenizer, enclosing_tokenizer, random_prefix):
    labelled, has_head = "labels" in header, header.get("labels", {}).get("by") == "head"
    tokenizer = enclosing_tokenizer if has_head else tiny_tokenizer
    backbone = Backbone.from_model(make_model(family, tokenizer, 0), tokenizer, f"tiny-{family}")
    head = Head(torch.randn(2, backbone.hidden_size), torch.zeros(2)) if has_head else None
    prefix = Prefix(random_prefix(backbone, 3).detach().layers, header, head)
    examples = [pt.Example(f"n : {c}", ("xy"[i % 2] if labelled else f"{c}{c} it is.",)) for i, c in enumerate("abcd")]
    subject = make_subject(backbone, prefix, examples)
    views = list(explain(subject))
    assert {view.name for view in views if view.left_out} == set(left_out)
    for view in views:
        assert left_out.get(view.name, "") in view.left_out
    loss = next(view for view in views if view.name == "loss").numbers
    assert len(loss["positions"]) == 3
    assert all(part["change"] != 0 for part in loss["positions"])
    if family == "bart":
        assert views[0].numbers["sites"].keys() == {"encoder", "decoder", "cross"}
    shown(views)
    assert json.dumps(summarize(subject, views), allow_nan=False)
