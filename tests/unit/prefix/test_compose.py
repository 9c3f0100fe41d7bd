"""Prefixes of several: what is put where, what the header keeps, and what is refused."""

import numpy as np
import pytest
import torch

from prefixtune.errors import BackboneError, CheckpointError, ConfigError
from prefixtune.prefix.compose import average, concatenate, cut
from prefixtune.prefix.prefix import Head, Prefix, content_hash
from prefixtune.prefix.rotation import PairTurns, Rotation

ROTATION = Rotation("rotary", {"decoder": (PairTurns((0,), (2,), (0.5,)), None)}, 40)
FORMAT = {"prompt": "{source}{separator}", "target": "{target}", "separator": " ", "end": "</s>"}


def _prefix(length, seed=0, *, dtype=torch.float32, **header):
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(2, length, 4, generator=generator).to(dtype)

    origin = {"name": "tiny", "fingerprint": "abc:", "kind": "decoder"}
    return Prefix(
        {"decoder": tuple((draw(), draw()) for _ in range(2))},
        {"backbone": origin, "rotation": ROTATION.to_header(), **header},
    )


def _with_head(prefix, *labels):
    header = {**prefix.header, "labels": {"kind": "classification", "by": "head", "names": list(labels)}}
    return Prefix(prefix.layers, header, Head(torch.randn(len(labels), 8), torch.randn(len(labels))))


# --- one after the other ---------------------------------------------------------------------------------------------


def test_the_header_keeps_what_each_part_was():
    training = {"dev_loss": 1.5, "backbone_dtype": "bfloat16", "steps": 9}
    manual = _prefix(3, 1, task="manual", form="question", training=training)
    style = _prefix(2, 2, task="style", form="prompt", text_format=FORMAT, license="mine")
    header = concatenate([manual, style], names=["a.safetensors", "b.safetensors"]).header
    assert (header["task"], header["form"], header["text_format"]) == ("style", "prompt", FORMAT)
    assert header["backbone"] == manual.header["backbone"]
    assert Rotation.from_header(header["rotation"]) == ROTATION
    assert "training" not in header
    measured = {"dev_loss": 1.5, "backbone_dtype": "bfloat16"}
    first = {"name": "a.safetensors", "prefix_length": {"decoder": 3}, "task": "manual", **measured}
    second = {"name": "b.safetensors", "prefix_length": {"decoder": 2}, "task": "style", "license": "mine"}
    parts = [{**first, "hash": content_hash(manual)}, {**second, "hash": content_hash(style)}]
    assert header["composition"] == {"mode": "concatenate", "parts": parts}


def test_the_longest_prompt_is_that_of_all_parts_that_write_the_same_text():
    lengths = (1, 30, {"max_length": 60}), (2, 20, {"max_length": 40}), (3, 90, {"prompt": "Q: {source}"})
    a, b, other = (
        _prefix(2, seed, text_format={**FORMAT, "longest_prompt": longest, "longest_target": 5, **more})
        for seed, longest, more in lengths
    )
    longest = {"longest_prompt": 30, "longest_target": 5, "max_length": 60}
    assert concatenate([a, b]).header["text_format"] == {**FORMAT, **longest}
    assert concatenate([other, a, b]).header["text_format"]["longest_prompt"] == 30
    assert concatenate([a, b, other]).header["text_format"] == other.header["text_format"]


def test_joined_parts_of_parts_are_one_list_in_order():
    a, b, c = (_prefix(length, length, questions=[[f"{length}?", "Yes."]]) for length in (3, 5, 2))
    nested = concatenate([concatenate([a, b]), c])
    flat = concatenate([a, b, c])
    torch.testing.assert_close(nested.tensors(), flat.tensors(), rtol=0, atol=1e-6)
    assert sorted(nested.header["questions"]) == sorted(one.header["questions"][0] for one in (a, b, c))
    beside = _prefix(3, 9, training={"beside": {"positions": "shared"}})
    assert concatenate([average([beside, beside]), c]).header["composition"]["positions"] == "shared"
    hashes = [part["hash"] for part in nested.header["composition"]["parts"]]
    assert hashes == [content_hash(part) for part in (a, b, c)]
    mean = average([a, _prefix(3, 9)])
    (entry, _) = concatenate([mean, c]).header["composition"]["parts"]
    assert entry["composition"] == {"mode": "average", "hashes": [content_hash(a), content_hash(_prefix(3, 9))]}


def test_one_part_may_classify():
    classifier = _with_head(_prefix(3, 1), "good", "bad")
    joined = concatenate([classifier, _prefix(2, 2, task="style")])
    assert joined.head is classifier.head
    assert joined.header["labels"]["names"] == ["good", "bad"]
    with pytest.raises(ConfigError):
        concatenate([classifier, _with_head(_prefix(2, 2), "yes", "no")])


def test_what_cannot_be_joined_is_refused_by_name():
    other = {"name": "large", "fingerprint": "abd:", "kind": "decoder"}
    narrow = Prefix({"decoder": ((torch.zeros(2, 3, 3), torch.zeros(2, 3, 3)),) * 2})
    for parts, error in (
        ([_prefix(3), _prefix(3, backbone=other)], BackboneError),
        ([_prefix(3, backbone=None), _prefix(3), _prefix(3, backbone=other)], BackboneError),
        ([_prefix(3), narrow], BackboneError),
        ([_prefix(30), _prefix(10)], ConfigError),
        ([_prefix(3), _prefix(3, adapter="adapter")], ConfigError),
        ([_prefix(3, rotation=None)] * 2, ConfigError),
        ([], ConfigError),
    ):
        with pytest.raises(error):
            concatenate(parts)
    with pytest.raises(ConfigError):
        concatenate([concatenate([_prefix(1)] * 30)] * 2 + [_prefix(1)] * 5, Rotation("none"))


def _at(**layers):
    """A prefix of two positions without a header: site -> its layers."""
    pair = (torch.ones(2, 2, 4), torch.ones(2, 2, 4))
    return Prefix({site: (pair,) * count for site, count in layers.items()})


def test_every_site_has_one_shape_in_all_parts_that_have_it():
    joined = concatenate([_at(encoder=2), _at(cross=3), _at(encoder=2, cross=3)])
    assert joined.lengths == {"encoder": 4, "cross": 4}
    with pytest.raises(BackboneError):
        concatenate([_at(decoder=2), _at(decoder=2, encoder=2), _at(decoder=2, encoder=3)])


@pytest.mark.parametrize("mode", [concatenate, average])
def test_a_rotation_of_another_model_is_refused(mode):
    made_up = _prefix(3, 2, rotation=Rotation("rotary", {"decoder": (PairTurns((0,), (4,), (0.5,)), None)}).to_header())
    with pytest.raises(CheckpointError):
        mode([_prefix(3, 1), made_up])
    # What the backbone itself says comes first.
    assert concatenate([made_up, _prefix(3, 1)], ROTATION).header["rotation"] == ROTATION.to_header()


def test_a_made_up_composition_in_a_header_does_no_harm():
    for made_up in ({"mode": 3, "parts": "x"}, {"parts": [1, 2]}, {}):
        joined = concatenate([_prefix(3, 1, composition=made_up), _prefix(2, 2)])
        assert len(joined.header["composition"]["parts"]) == 2


# --- number by number ------------------------------------------------------------------------------------------------


def test_blends_are_weighted_sums():
    a, b = (_prefix(3, seed) for seed in (1, 2))
    mean, mixed = average([a, b]), average([a, b], np.array([0.25, 0.75], np.float32))
    for x, y, one, two in zip(*(prefix.tensors() for prefix in (a, b, mean, mixed)), strict=True):
        assert torch.allclose(one, (x + y) / 2, atol=1e-6)
        assert torch.allclose(two, 0.25 * x + 0.75 * y, atol=1e-6)
    assert [part["weight"] for part in mixed.header["composition"]["parts"]] == [0.25, 0.75]
    assert Rotation.from_header(mean.header["rotation"]) == ROTATION


def test_heads_of_the_same_labels_are_averaged():
    one, two = _with_head(_prefix(3, 1), "good", "bad"), _with_head(_prefix(3, 2), "good", "bad")
    mean = average([one, two])
    assert torch.allclose(mean.head.weight, (one.head.weight + two.head.weight) / 2, atol=1e-6)
    small = _with_head(_prefix(3, 1, dtype=torch.bfloat16), "good", "bad")
    assert torch.equal(average([small, small]).head.weight, small.head.weight)
    with pytest.raises(ConfigError):
        average([one, _with_head(_prefix(3, 2), "yes", "no")])
    with pytest.raises(ConfigError):
        average([one, _prefix(3, 2)])


def test_blends_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError):
        average([_prefix(3), _prefix(4)])
    for weights in ((0.5, 0.6), (1.0,), (float("nan"), 1.0), ("a", 1)):
        with pytest.raises(ConfigError):
            average([_prefix(3), _prefix(3)], weights)


# --- cut -------------------------------------------------------------------------------------------------------------


def test_cut_at_the_end_leaves_the_first_positions_as_they_are():
    whole = _prefix(5, 1, task="mine")
    short = cut(whole, 2)
    assert short.equal(whole[:2])
    assert short.header["task"] == "mine"
    (part,) = short.header["composition"]["parts"]
    assert part["hash"] == content_hash(whole)
    assert short.header["composition"]["at"] == "end"


def test_a_cut_prefix_does_not_claim_what_was_measured_of_the_whole():
    training = {"dev_loss": 1.25, "steps": 9}
    whole = _prefix(
        5, 1, training=training, initialization={"kind": "examples", "prefix_length": 5, "at_most": 6, "count": 2}
    )
    for end in ("start", "end"):
        header = cut(whole, 2, end=end).header
        assert header["training"] == {"steps": 9}
        assert header["initialization"] == {"kind": "examples", "count": 2}
        (part,) = header["composition"]["parts"]
        assert (part["dev_loss"], part["prefix_length"]) == (1.25, {"decoder": 5})


def test_cut_at_the_start_undoes_a_join():
    a, b = _prefix(3, 1), _prefix(4, 2)
    back = cut(concatenate([a, b]), 4, end="start")
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(back.tensors(), b.tensors(), strict=True))
    assert cut(concatenate([a, b]), 3).equal(a)


def test_of_joined_parts_what_stays_has_no_questions_of_the_others():
    owl, fox = (_prefix(3, seed, questions=[[f"Where is {name}?", "There."]]) for seed, name in enumerate(("it", "he")))
    joined = concatenate([owl, fox])
    assert len(joined.header["questions"]) == 2
    assert "questions" not in cut(joined, 3, end="start").header
    assert cut(owl, 2).header["questions"] == owl.header["questions"]


def test_a_cut_that_cuts_nothing_is_refused():
    for length in (0, 5, 9, 3.0, True):
        with pytest.raises(ConfigError):
            cut(_prefix(5), length)
    with pytest.raises(ConfigError):
        cut(_prefix(5, rotation=None), 2, end="start")
