"""The four comparisons: sound models pass all that apply to them, and faults are found by those that should."""

from dataclasses import replace

import pytest
import torch
from transformers import AttentionInterface

from patching import replace_everywhere
from prefixtune.attention.injection import Injection, batch_prefixes, current_injection
from prefixtune.attention.layout import cache_argument, using
from prefixtune.attention.masks import extend_mask
from prefixtune.attention.packed import packed_attention
from prefixtune.attention.packing import Packing, sees
from prefixtune.attention.registry import ATTENTION, attend
from prefixtune.backbone.backbone import Backbone
from prefixtune.doctor import examine as examine_module
from prefixtune.doctor.examine import examine
from zoo import make_model

GRADIENT = "a gradient reaches every layer's prefix"
PADDED = "padded = alone"
PACKED = "packed = alone"
CACHED = "cached = recomputed"
ALL = [GRADIENT, PADDED, PACKED, CACHED]


def failed(backbone):
    """The names of the comparisons that fail."""
    return {found.name for found in examine(backbone.model, backbone.layout) if not found.passed}


def patch_attention(monkeypatch, function):
    """Register another attention function under this project's name, for the length of a test."""
    monkeypatch.setitem(AttentionInterface._global_mapping, ATTENTION, function)


def attend_changed_at(site, change):
    """The attention function, with the arguments changed at one site; packed rows are left alone."""

    def patched(module, query, key, value, mask, **kwargs):
        injection = current_injection.get()
        arguments = {"query": query, "key": key, "value": value, "attention_mask": mask, **kwargs}
        if injection is not None and injection.packing is None and injection.layer_of.get(module, ("",))[0] == site:
            change(arguments)
        with using(current_injection, arguments.pop("injection", injection)):
            return attend(module, **arguments)

    return patched


def drop_prefix(arguments):
    arguments["injection"] = Injection({})


def see_everything(arguments):
    arguments["attention_mask"] = torch.ones(
        1, 1, arguments["query"].shape[2], arguments["key"].shape[2], dtype=torch.bool
    )


# --- sound models ----------------------------------------------------------------------------------------------------


# tests/unit/tools/test_models_page.py examines every type.
@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("llama", set()),
        ("mistral", set()),
        ("deepseek_v3", set()),
        ("lfm2", {PACKED}),  # rows are padded besides
        ("stablelm", set()),  # the prefix travels beside the call
        ("gemma3n_text", set()),  # layers share a prefix
        ("bart", set()),
        ("t5", set()),
        ("longt5-local", {PACKED}),  # the encoder attends through code of its own
        ("bert", {PACKED, CACHED}),
        ("modernbert", {PACKED, CACHED}),
    ],
)
def test_sound_models_pass(name, left_out, tiny_tokenizer):
    backbone = Backbone.from_model(make_model(name, tiny_tokenizer), tiny_tokenizer, name)
    found = examine(backbone.model, backbone.layout)
    assert [one.name for one in found] == [one for one in ALL if one not in left_out]
    assert all(one.passed and one.difference < 1e-4 and not one.error for one in found)


@pytest.mark.parametrize(
    ("name", "dtype"), [("gpt2", torch.float16), *((name, torch.bfloat16) for name in ("mistral", "t5", "bert"))]
)
def test_half_precision_is_examined_in_float32(name, dtype, tiny_models, monkeypatch):
    backbone = Backbone.from_model(tiny_models(name).to(dtype), None, name)
    before = {key: (tensor.data_ptr(), tensor.clone()) for key, tensor in backbone.model.state_dict().items()}
    exact = [one.difference for one in examine(backbone.model, backbone.layout)]
    assert max(exact) < 1e-4
    after = backbone.model.state_dict()
    assert all(after[key].data_ptr() == where for key, (where, _) in before.items())
    assert all(torch.equal(after[key], tensor) for key, (_, tensor) in before.items())
    # Without the memory for it, in its own dtype.
    monkeypatch.setattr(examine_module, "_MOST_BYTES", 0)
    found = examine(backbone.model, backbone.layout)
    assert all(one.passed for one in found)
    assert [one.difference for one in found] != exact


def test_copies_take_half_of_the_free_memory_at_most(tiny_models, monkeypatch):
    model = tiny_models("llama").to(torch.bfloat16)
    needed = 4 * sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    for free, exact in ((2 * needed, True), (needed, False)):
        monkeypatch.setattr(examine_module, "free_memory", lambda device, free=free: free)
        assert examine_module.computes_exactly(model, torch.device("cpu")) is exact
        assert not examine_module.computes_exactly(model, torch.device("mps"))


def test_nothing_is_left_changed(tiny_backbone):
    backbone = tiny_backbone("llama")
    weight = backbone.model.model.norm.weight.requires_grad_()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    weights = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    first = examine(backbone.model, backbone.layout)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()
    assert weight.grad is None
    assert all(torch.equal(tensor, weights[name]) for name, tensor in backbone.model.state_dict().items())
    with torch.no_grad():
        assert examine(backbone.model, backbone.layout) == first


def test_an_error_is_a_failed_comparison(tiny_backbone, monkeypatch):
    def broken(*args, **options):
        raise ValueError("no cache today.\nmore of it")

    backbone = tiny_backbone("gpt2")
    with monkeypatch.context() as patch:
        replace_everywhere(patch, cache_argument, broken)
        assert failed(backbone) == {CACHED}
        assert examine(backbone.model, backbone.layout)[-1].error == "ValueError: no cache today."
    weight = backbone.model.lm_head.weight
    with monkeypatch.context() as patch:
        patch.setattr(weight, "data", torch.full_like(weight, float("nan")))
        assert all(one.error for one in examine(backbone.model, backbone.layout) if one.name != GRADIENT)
    monkeypatch.setattr(backbone.model, "forward", broken)
    (found,) = examine(backbone.model, backbone.layout)
    assert not found.passed


# --- faults of attention ---------------------------------------------------------------------------------------------


def test_another_attention_function(tiny_backbone):
    backbone = tiny_backbone("llama")
    backbone.model.set_attn_implementation("sdpa")
    assert GRADIENT in failed(backbone)


def test_one_layer_with_another_attention_function(tiny_backbone, monkeypatch):
    backbone = tiny_backbone("llama")
    layer = backbone.model.model.layers[1]
    monkeypatch.setattr(layer.self_attn, "forward", lambda hidden_states, **_: (torch.zeros_like(hidden_states), None))
    assert GRADIENT in failed(backbone)


def test_a_prefix_that_is_cut_from_the_graph(tiny_backbone, monkeypatch):
    stack = batch_prefixes

    def detached(*args):
        made = stack(*args)
        # The last slot's keys of every layer get no gradient; the values all do.
        layers = {
            site: [(torch.cat([k[:, :, :-1], k[:, :, -1:].detach()], dim=2), v) for k, v in pairs]
            for site, pairs in made.layers.items()
        }
        return replace(made, layers=layers)

    replace_everywhere(monkeypatch, batch_prefixes, detached)
    assert failed(tiny_backbone("gpt2")) == {GRADIENT}
    assert failed(tiny_backbone("bert")) == {GRADIENT}


def test_packed_rows_whose_gradient_is_lost(tiny_backbone, monkeypatch):
    packed = packed_attention

    def cut(packing, site, prefixes, *args):
        detached = [None if kv is None else (kv[0].detach(), kv[1]) for kv in prefixes]
        return packed(packing, site, detached, *args)

    replace_everywhere(monkeypatch, packed_attention, cut)
    assert failed(tiny_backbone("llama")) == {GRADIENT}
    assert failed(tiny_backbone("t5")) == {GRADIENT}


def test_attention_that_sees_the_future(tiny_backbone, monkeypatch):
    def change(arguments):
        if current_injection.get().layers:
            see_everything(arguments)

    backbone = tiny_backbone("llama")
    patch_attention(monkeypatch, attend_changed_at("decoder", change))
    assert {PADDED, PACKED, CACHED} <= failed(backbone)


@pytest.mark.parametrize("site", ["encoder", "decoder", "cross"])
def test_a_dead_site(site, tiny_backbone, monkeypatch):
    backbone = tiny_backbone("t5")
    patch_attention(monkeypatch, attend_changed_at(site, drop_prefix))
    assert GRADIENT in failed(backbone)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_decoder_that_sees_the_future(name, tiny_backbone, monkeypatch):
    backbone = tiny_backbone(name)
    patch_attention(monkeypatch, attend_changed_at("decoder", see_everything))
    assert {PADDED, PACKED, CACHED} <= failed(backbone)


# --- faults of batches -----------------------------------------------------------------------------------------------


def test_padding_slots_that_are_seen(tiny_backbone, monkeypatch):
    extend = extend_mask

    def blind(mask, visible, prefix_length, key, queries):
        return extend(mask, None, prefix_length, key, queries)

    replace_everywhere(monkeypatch, extend_mask, blind)
    assert failed(tiny_backbone("llama")) == {PADDED, CACHED}


@pytest.mark.parametrize(("site", "name"), [("encoder", "bart"), ("cross", "t5")])
def test_padded_sources_that_are_seen(site, name, tiny_backbone, monkeypatch):
    backbone = tiny_backbone(name)
    patch_attention(monkeypatch, attend_changed_at(site, see_everything))
    assert {PADDED, CACHED} <= failed(backbone)


def test_targets_that_see_each_other(tiny_backbone, monkeypatch):
    rule = sees

    def leaky(visibility, *places):
        keys = visibility.keys.clone()
        keys[1] = 0
        return rule(visibility._replace(keys=keys), *places)

    replace_everywhere(monkeypatch, sees, leaky)
    assert failed(tiny_backbone("llama")) == {PACKED}


def test_packed_targets_that_look_at_another_source(tiny_backbone, monkeypatch):
    sizes = Packing.sizes

    def turned(self, site):
        ours, theirs = sizes(self, site)
        return (ours, theirs[::-1]) if site == "cross" else (ours, theirs)

    monkeypatch.setattr(Packing, "sizes", turned)
    assert failed(tiny_backbone("bart")) == {PACKED}
