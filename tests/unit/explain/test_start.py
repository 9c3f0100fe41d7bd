"""The start of a prefix computed again: what a run of hardly any steps is at, and why a start is not known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prefixtune as pt
from prefixtune.explain.explain import explain
from prefixtune.explain.likeness import start_view
from prefixtune.explain.start import find_start
from prefixtune.prefix.compose import cut
from prefixtune.prefix.prefix import Prefix
from prefixtune.training.starts.text import stored_text
from prefixtune.training.starts.words import from_words

EXAMPLES = [
    pt.Example(f"n : {letter * count}", (f"{letter} it is.",)) for count, letter in enumerate("abcdef", start=1)
]


@pytest.fixture(scope="module")
def backbone(tiny_backbone: Callable[..., Any]) -> Any:
    return tiny_backbone("llama")


@pytest.fixture
def trained(backbone: Any, tmp_path: Path) -> Callable[..., Prefix]:
    """A function: `trained(**fields)` trains one step so small that the prefix stays where it began."""

    def run(**fields: Any) -> Prefix:
        config = pt.TrainConfig(max_steps=1, batch_size=2, learning_rate=1e-9, output=str(tmp_path / "run"), **fields)
        prefix: Prefix = pt.train(config, backbone=backbone, examples=EXAMPLES).prefix
        return prefix

    return run


def test_a_start_from_examples_needs_the_training_data(
    backbone: Any, trained: Callable[..., Prefix], assert_same: Callable[..., None]
) -> None:
    prefix = trained(init_examples=2)
    start, note = find_start(backbone, prefix, EXAMPLES)
    assert start is not None
    assert_same(start.tensors(), prefix.tensors(), tolerance=1e-4)
    first, second = prefix.header["initialization"]["examples"]
    assert note == f"the training examples {first}, {second}"
    assert find_start(backbone, prefix)[0] is None
    assert "--train" in find_start(backbone, prefix)[1]
    assert "not those of --train" in find_start(backbone, prefix, EXAMPLES[::-1])[1]
    assert "not those of --train" in find_start(backbone, prefix, EXAMPLES[:1])[1]
    assert "no longer that of its start" in find_start(backbone, prefix[:3], EXAMPLES)[1]


def test_a_start_from_examples_that_were_left_after_some_were_held_out(
    backbone: Any, trained: Callable[..., Prefix], assert_same: Callable[..., None]
) -> None:
    prefix = trained(init_examples=2, hold_out=0.4)
    assert prefix.header["initialization"]["held_out"] == {"share": 0.4, "seed": 0}
    start, _ = find_start(backbone, prefix, EXAMPLES)
    assert start is not None
    assert_same(start.tensors(), prefix.tensors(), tolerance=1e-4)


@pytest.mark.parametrize(("length", "known"), [(400, True), (9_000, True), (11_000, False)])
def test_a_start_from_a_long_text_is_known_where_the_file_holds_all_of_it(
    length: int, known: bool, backbone: Any, trained: Callable[..., Prefix], assert_same: Callable[..., None]
) -> None:
    text = "".join(f"{number} " for number in range(length))[:length].strip()
    prefix = trained(prefix_length=6, init_text=text)
    start, note = find_start(backbone, prefix)
    if not known:
        assert (start, note) == (None, "training started from words of which the file holds the beginning only.")
        return
    assert start is not None
    assert_same(start.tensors(), prefix.tensors(), tolerance=1e-4)


def test_what_an_earlier_version_stored_of_a_long_text_is_not_taken_for_all_of_it() -> None:
    assert stored_text({"kind": "words", "text": "a" * 1000}) is None
    assert stored_text({"kind": "words", "text": "a" * 999}) == "a" * 999
    assert stored_text({"kind": "words", "text": 3}) is None


def test_a_start_from_words(backbone: Any, trained: Callable[..., Prefix], assert_same: Callable[..., None]) -> None:
    prefix = trained(prefix_length=3, init_text="some words")
    start, note = find_start(backbone, prefix)
    assert note == "the words 'some words'"
    assert start is not None
    assert_same(start.tensors(), prefix.tensors(), tolerance=1e-4)


def test_other_starts_are_not_known(backbone: Any, trained: Callable[..., Prefix], random_prefix: Any) -> None:
    assert "random numbers" in find_start(backbone, trained(initialization="random", prefix_length=3))[1]
    assert "does not say" in find_start(backbone, random_prefix(backbone, 2))[1]
    hostile = {"initialization": {"kind": "examples", "examples": ["x", -1], "tokens": 3, "lengths": None}}
    assert "not those" in find_start(backbone, Prefix(random_prefix(backbone, 2).layers, hostile), EXAMPLES)[1]


def test_the_view_says_why(backbone: Any, make: Callable[..., Any]) -> None:
    view = start_view(make(backbone, header={"initialization": {"kind": "prefix", "file": "p.safetensors"}}))
    assert "started from 'prefix'" in view.left_out


def test_a_prefix_that_was_cut_has_its_start_only_where_its_first_positions_stay(
    backbone: Any, trained: Callable[..., Prefix], assert_same: Callable[..., None]
) -> None:
    prefix = trained(prefix_length=4, init_text="some words")
    first = cut(prefix, 3)
    start, _ = find_start(backbone, first)
    assert start is not None
    assert_same(start.tensors(), first.tensors(), tolerance=1e-4)
    last = cut(prefix, 3, backbone.rotation, end="start")
    assert "cut at its start" in find_start(backbone, last)[1]
    assert "cut at its start" in find_start(backbone, cut(last, 2))[1]


@pytest.mark.parametrize("family", ["bert", "bart"])
def test_the_start_of_a_cut_prefix_was_computed_for_all_its_words(
    family: str, tiny_backbone: Callable[..., Any], assert_same: Callable[..., None]
) -> None:
    backbone = tiny_backbone(family)
    facts = {"initialization": {"kind": "words", "text": "some words"}}
    whole = Prefix(from_words(backbone, "some words", 6).layers, facts)
    first = cut(whole, 3)
    start, _ = find_start(backbone, first)
    assert start is not None
    assert_same(start.tensors(), first.tensors())
    for length in ("6", 2, 10**9, None):
        parts = [{"prefix_length": dict.fromkeys(first.sites, length)}]
        wrong = Prefix(first.layers, {**facts, "composition": {"mode": "cut", "at": "end", "parts": parts}})
        assert find_start(backbone, wrong) == (
            None,
            "the prefix was cut after training, and the file does not say from which length.",
        )


@pytest.mark.parametrize(
    "wrong",
    [
        {"lengths": [10**12, 1]},
        {"lengths": ["x", None]},
        {"lengths": [1]},
        {"lengths": [True, 2]},
        {"lengths": [0, 0]},
        {"examples": [0] * 10_000},
        {"examples": {}},
        {"tokens": [[]]},
    ],
)
def test_a_header_that_lies_about_its_start_is_found_out_before_anything_is_computed(
    backbone: Any, trained: Callable[..., Prefix], monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]
) -> None:
    prefix = trained(init_examples=2)
    header = {**prefix.header, "initialization": {**prefix.header["initialization"], **wrong}}

    def compute(*_: Any, **__: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr("prefixtune.explain.start.from_examples", compute)
    start, why = find_start(backbone, Prefix(prefix.layers, header), EXAMPLES)
    assert start is None
    assert "not those of --train" in why or "its length is no longer" in why


def test_a_start_that_cannot_be_computed_leaves_the_other_views(backbone: Any, random_prefix: Any) -> None:
    prefix = random_prefix(backbone, 2).detach()
    header = {**prefix.header, "initialization": {"kind": "words", "text": ""}}
    (view,) = explain(backbone, Prefix(prefix.layers, header), views=("start",))
    assert "no token" in view.left_out
