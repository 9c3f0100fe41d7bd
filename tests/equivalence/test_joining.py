"""Moved keys are those that the model computes at the new positions; joined prefixes are both texts' caches in front.

The other side of each comparison is transformers' own model, untouched, with its own cache.
"""

import pytest
import torch

from oracles import behind_cache
from prefixtune.attention.layout import cache_argument
from prefixtune.attention.record import compute_kv, prefix_from_tokens
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.prefixes import make_header
from prefixtune.errors import BackboneError
from prefixtune.prefix.compose import concatenate, cut
from prefixtune.prefix.prefix import Prefix
from zoo import exists, make_model

ROTARY = (
    *("llama", "qwen2", "qwen3", "gemma", "gemma2", "gpt_neox", "phi", "gptj", "codegen", "cohere", "glm", "stablelm"),
    *("persimmon", "deepseek_v3", "mixtral"),
)
"""Pairs that turn in all of a head or in a part of it, side by side or interleaved."""

BY_LAYER = (
    *("gemma3_text", "gemma4_text", "modernbert-decoder", "smollm3", "cohere2", "llama4_text", "exaone4", "zamba2"),
)
"""Layers that turn in ways of their own, or have no positions."""

SCALED = {
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 40,
    },
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 40},
}


@pytest.fixture(scope="module")
def backbone(tiny_tokenizer):
    """A factory of tiny backbones of the zoo."""

    def make(name, **changes):
        if not exists(name):
            pytest.skip(f"this transformers has no {name}")
        return Backbone.from_model(make_model(name, tiny_tokenizer, **changes), tiny_tokenizer, f"tiny-{name}")

    return make


def _ids(count, seed):
    return torch.randint(90, (1, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _kv_at(backbone, ids, start):
    positions = torch.arange(ids.shape[1])[None] + start
    return compute_kv(backbone.model, backbone.layout, input_ids=ids, position_ids=positions)


def _worst(one, other):
    """The largest difference, relative to the largest number of each tensor."""
    pairs = zip(one.tensors(), other.tensors(), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("offset", [1, 140])
@pytest.mark.parametrize("name", [*ROTARY, *BY_LAYER])
def test_turned_keys_are_those_computed_at_the_new_positions(backbone, name, offset):
    made, ids = backbone(name), _ids(9, seed=offset)
    here, there = _kv_at(made, ids, 0), _kv_at(made, ids, offset)
    assert (made.rotation.positions, made.rotation.is_exact) == ("rotary", True)
    assert _worst(made.rotation.turn(here, offset), there) < 1e-5
    assert _worst(made.rotation.turn(there, -offset), here) < 1e-5
    assert _worst(here, there) > 0.05


@pytest.mark.parametrize("kind", list(SCALED))
def test_scaled_frequencies_are_found(backbone, kind):
    made, ids = backbone("llama", rope_parameters=SCALED[kind]), _ids(9, seed=3)
    assert _worst(made.rotation.turn(_kv_at(made, ids, 0), 77), _kv_at(made, ids, 77)) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_bigcode", "biogpt", "ctrl"])
def test_positions_added_to_the_input_cannot_be_moved_on(backbone, name):
    made, ids = backbone(name), _ids(9, seed=1)
    here = _kv_at(made, ids, 0)
    assert made.rotation.positions == "absolute"
    assert not made.rotation.is_exact
    assert made.rotation.turn(here, 40).equal(here)
    assert _worst(here, _kv_at(made, ids, 40)) > 0.05


@pytest.mark.parametrize("name", ["jamba", "granitemoehybrid", "nemotron_h"])
def test_keys_without_positions_stay(backbone, name):
    made, ids = backbone(name), _ids(9, seed=1)
    here = _kv_at(made, ids, 0)
    assert made.rotation.positions == "none"
    assert made.rotation.is_exact
    assert made.rotation.turn(here, 40).equal(here)
    assert _worst(here, _kv_at(made, ids, 40)) < 1e-5


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_length_are_refused(backbone, kind):
    factors = [1.0] * 4
    settings = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    if kind == "longrope":
        settings |= {"long_factor": factors, "short_factor": factors, "original_max_position_embeddings": 40}
    made = backbone("llama", rope_parameters=settings)
    with pytest.raises(BackboneError, match=f"rope_type '{kind}'"):
        _ = made.rotation
    # Its prefixes are still trained and stored: they are used alone.
    assert "rotation" not in make_header(made)


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon-alibi"])
def test_models_with_alibi_are_no_backbones(backbone, name):
    with pytest.raises(BackboneError, match="attend through transformers' registry"):
        backbone(name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("times", [20, 400])
def test_one_very_large_number_hides_no_other(backbone, dtype, times):
    made = backbone("qwen2", rope_parameters={"rope_type": "default", "rope_theta": 1e6}, max_position_embeddings=4096)
    with torch.no_grad():
        for layer in made.model.model.layers:
            projection = layer.self_attn.k_proj
            size = projection.weight.norm(dim=1).mean()
            bias = projection.bias.view(-1, layer.self_attn.head_dim)
            # The slowest pair alone, as in Qwen2's own weights.
            half = bias.shape[1] // 2
            bias[:, half - 1], bias[:, -1] = times * size, -times * size
    made = Backbone.from_model(made.model.to(dtype), made.tokenizer, "large")
    expected = made.model.model.rotary_emb.inv_freq.tolist()
    for turn in made.rotation.layers["decoder"]:
        assert turn is not None
        assert (turn.first, turn.second) == (tuple(range(half)), tuple(range(half, 2 * half)))
        assert turn.frequencies == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_turns_by_layer_are_found_in_half_precision(backbone, dtype):
    exact = backbone("gemma3_text")
    rough = Backbone.from_model(make_model("gemma3_text", exact.tokenizer).to(dtype), exact.tokenizer, "rough")
    key = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    for one, other in zip(exact.rotation.layers["decoder"], rough.rotation.layers["decoder"], strict=True):
        assert one is not None
        assert other is not None
        size = max(*one.first, *one.second) + 1
        torch.testing.assert_close(other(key[..., :size], 50), one(key[..., :size], 50), rtol=0, atol=0.05)


def test_attention_that_depends_on_absolute_positions_is_refused(backbone):
    # Keys are scaled number by number after they are turned, so that scores depend on more than distances.
    with pytest.raises(BackboneError, match="no rotation"):
        _ = backbone("hunyuan_v1_dense").rotation


@torch.no_grad()
def _logits_behind(model, caches, ids, start):
    """The untouched model's logits for a text behind several caches, at positions from `start` on."""
    from transformers import DynamicCache

    joined = DynamicCache()
    for number, layers in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        keys, values = ([getattr(layer, part) for layer in layers] for part in ("keys", "values"))
        joined.update(torch.cat(keys, dim=2), torch.cat(values, dim=2), number)
    return behind_cache(model, joined, ids, start).logits


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "gpt_neox", "phi", "gptj", "cohere", "smollm3", "gpt2"])
def test_joined_prefixes_are_both_caches_in_front(backbone, tiny_tokenizer, name):
    made, plain = backbone(name), make_model(name, tiny_tokenizer)
    texts, text = [_ids(6, 1), _ids(4, 2), _ids(5, 3)], _ids(7, 4)
    prefixes = [prefix_from_tokens(made.model, made.layout, ids) for ids in texts]
    joined = concatenate(prefixes, made.rotation)
    caches, start = [], 0
    with torch.no_grad():
        for ids in texts:
            # Absolute positions cannot be moved on: there each part stays where it was computed.
            begins = 0 if made.rotation.positions == "absolute" else start
            positions = torch.arange(ids.shape[1])[None] + begins
            output = plain(input_ids=ids, position_ids=positions, use_cache=True)
            caches.append(output[cache_argument(plain)])
            start += ids.shape[1]
        ours = made.forward(text, prefixes=joined).logits
    theirs = _logits_behind(plain, caches, text, start)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    swapped = concatenate([prefixes[1], prefixes[0], prefixes[2]], made.rotation)
    assert (made.forward(text, prefixes=swapped).logits - ours).norm() > 1e-3 or made.rotation.positions == "absolute"


@pytest.mark.parametrize("name", ["bart", "t5", "t5gemma"])
def test_an_encoder_decoders_parts_stand_beside_each_other(backbone, name):
    made = backbone(name)
    one, other = (prefix_from_tokens(made.model, made.layout, _ids(count, count)) for count in (6, 4))
    assert made.rotation.positions == "none"
    assert made.rotation.turn(other, 6).equal(other)
    joined, swapped = concatenate([one, other], made.rotation), concatenate([other, one], made.rotation)
    for site in joined.sites:
        assert torch.equal(joined.layers[site][0][0][:, 6:], other.layers[site][0][0])
    call = {"decoder_input_ids": _ids(5, 8)}
    logits = [made.forward(_ids(7, 9), prefixes=prefix, **call).logits for prefix in (joined, swapped, one)]
    # Text and parts have no positions towards each other, so that the order means nothing.
    assert (logits[0] - logits[1]).norm() / logits[0].norm() < 1e-5
    assert (logits[0] - logits[2]).norm() / logits[0].norm() > 1e-3


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_parts_that_were_trained_beside_others_stand_right_before_the_text(backbone, name):
    """In any order the same; and cut apart again, each is what it was."""
    made, text = backbone(name), _ids(7, 4)
    header = {"training": {"beside": {"positions": "shared"}}}
    parts = [prefix_from_tokens(made.model, made.layout, _ids(count, count)) for count in (6, 4, 5)]
    one, two, three = (Prefix(part.layers, header) for part in parts)
    joined = concatenate([one, two, three], made.rotation)
    again = concatenate([three, concatenate([two, one], made.rotation)], made.rotation)
    logits = [made.forward(text, prefixes=prefix).logits for prefix in (joined, again)]
    assert (logits[0] - logits[1]).norm() / logits[0].norm() < 1e-5
    assert _worst(cut(joined, 6), one) < 1e-5
    assert _worst(cut(joined, 5, end="start"), three) < 1e-5


def test_gradients_reach_every_part(backbone):
    made = backbone("llama")
    leaves = [prefix_from_tokens(made.model, made.layout, _ids(count, count)).leaves() for count in (3, 4)]
    joined = concatenate(leaves, made.rotation)
    made.forward(_ids(5, 1), prefixes=joined).logits.square().mean().backward()
    assert all(bool((tensor.grad != 0).any()) for leaf in leaves for tensor in leaf.tensors())
