"""The self-check passes on sound backbones, and every sabotage is caught by the check that should catch it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface

from prefixtune import attach, doctor
from prefixtune.backbone import Backbone
from prefixtune.doctor import Check, examine
from prefixtune.errors import BackboneError, ConfigError

REGISTRY = "every layer attends through the registry"
LAYERS = "every layer receives the prefix"
GRADIENTS = "every prefix slot receives a gradient"
CAUSALITY = "no token sees a later one"
ROUTES = "injected = prefilled"
PADDING = "padded = unpadded"
BATCH = "batch = single"
MIXED = "mixed prefixes = one by one"
PACKING = "packed = one pair at a time"
IN_GENERATION = "generation uses the prefix"
GREEDY = "cached decoding = full recomputation"
BEAMS = "beam search = full recomputation"
WINDOW = "sliding windows keep the prefix"
EVALUATION = "dropout stays off in training mode"
CHECKPOINTING = "gradient checkpointing changes nothing"
UNTOUCHED = "the backbone is untouched"

EVERYWHERE = [
    REGISTRY, LAYERS, GRADIENTS, CAUSALITY, ROUTES, PADDING, BATCH, MIXED, PACKING, IN_GENERATION, GREEDY, BEAMS,
    EVALUATION, CHECKPOINTING, UNTOUCHED,
]  # fmt: skip

Make = Callable[..., Any]


def failed(backbone: Any, **options: Any) -> dict[str, str]:
    """The names of the checks that fail, and what they say."""
    return {check.name: check.detail for check in examine(backbone, **options) if not check.passed}


def patch_attention(monkeypatch: pytest.MonkeyPatch, attend: Callable[..., Any]) -> None:
    """Register another attention function under this project's name, for the length of a test."""
    monkeypatch.setitem(AttentionInterface._global_mapping, attach.ATTENTION, attend)


# --- sound backbones -------------------------------------------------------------------------------------------------


def test_every_family_passes(family: str, tiny_backbone: Make) -> None:
    told: list[Check] = []
    checks = examine(tiny_backbone(family), on_check=told.append)
    assert [c for c in checks if not c.passed] == []
    expected = [name for name in [*EVERYWHERE[:-3], WINDOW, *EVERYWHERE[-3:]] if name != WINDOW or family == "mistral"]
    assert [c.name for c in checks] == expected
    assert told == checks
    assert all(c.detail for c in checks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_half_precision_passes(name: str, dtype: torch.dtype, tiny_models: Make, tiny_tokenizer: Any) -> None:
    checks = examine(Backbone.from_model(tiny_models(name).to(dtype), tiny_tokenizer, name))
    assert [c for c in checks if not c.passed] == []
    bound = "0.05" if dtype == torch.bfloat16 else "0.01"
    assert f"at most {bound}" in next(c.detail for c in checks if c.name == GREEDY)


@pytest.mark.parametrize("length", [1, 9])
def test_other_lengths_and_seeds_pass(length: int, tiny_backbone: Make) -> None:
    assert failed(tiny_backbone("llama"), prefix_length=length, seed=length) == {}


def test_small_weights_are_met_with_stronger_prefixes(tiny_models: Make, tiny_tokenizer: Any) -> None:
    model = tiny_models("llama")
    for name, parameter in model.named_parameters():
        if "o_proj" in name:
            parameter.data.mul_(1e-3)
    checks = examine(Backbone.from_model(model, tiny_tokenizer, "weak"))
    assert [c for c in checks if not c.passed] == []
    assert "strength 1)" not in checks[1].detail


def test_a_window_in_some_layers_only(tiny_backbone: Make) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    backbone = tiny_backbone("qwen3", use_sliding_window=True, sliding_window=4, layer_types=kinds)
    checks = {c.name: c for c in examine(backbone)}
    assert all(c.passed for c in checks.values())
    assert "window 4, 1 layers: 7 of 7 slots" in checks[WINDOW].detail


@pytest.mark.parametrize("window", [None, 150, 600])
def test_no_line_without_a_window_that_can_be_tried(window: int | None, tiny_backbone: Make) -> None:
    positions = 1024 if window == 600 else 160
    checks = examine(tiny_backbone("mistral", sliding_window=window, max_position_embeddings=positions))
    assert WINDOW not in [c.name for c in checks]


def test_no_line_without_gradient_checkpointing(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone("gpt2")
    monkeypatch.setattr(type(backbone.model), "supports_gradient_checkpointing", False)
    assert CHECKPOINTING not in [c.name for c in examine(backbone)]


def test_nothing_is_left_changed(tiny_backbone: Make) -> None:
    backbone = tiny_backbone("llama")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    weights = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    first = examine(backbone)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()
    assert not backbone.model.training
    assert all(torch.equal(tensor, weights[name]) for name, tensor in backbone.model.state_dict().items())
    assert examine(backbone) == first


def test_works_where_gradients_are_off(tiny_backbone: Make) -> None:
    with torch.no_grad():
        assert failed(tiny_backbone("gpt2")) == {}


@pytest.mark.parametrize("length", [0, -1, 135, 10_000])
def test_a_length_that_leaves_no_room_is_refused(length: int, tiny_backbone: Make) -> None:
    with pytest.raises(ConfigError, match="between 1 and 134"):
        examine(tiny_backbone("gpt2"), prefix_length=length)


# --- sabotage --------------------------------------------------------------------------------------------------------


def test_another_attention_function(tiny_backbone: Make) -> None:
    backbone = tiny_backbone("llama")
    backbone.model.set_attn_implementation("sdpa")
    told: list[Check] = []
    checks = examine(backbone, on_check=told.append)
    assert [(c.name, c.passed) for c in checks] == [(REGISTRY, False)]
    assert checks == told
    assert checks[0].detail.startswith("BackboneError: no layer attends")


def test_one_layer_with_another_attention_function(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone("llama")
    layer = backbone.model.model.layers[1]
    monkeypatch.setattr(layer.self_attn, "forward", lambda hidden_states, **_: (torch.zeros_like(hidden_states), None))
    assert "not every layer" in failed(backbone)[REGISTRY]


def test_a_layer_that_ignores_the_prefix(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(module: nn.Module, *args: Any, prefix_injection: Any = None, **kwargs: Any) -> Any:
        if prefix_injection is not None and prefix_injection.layers and prefix_injection.places[module][1] == 1:
            prefix_injection = None
        return attach.attend(module, *args, prefix_injection=prefix_injection, **kwargs)

    backbone = tiny_backbone("llama")
    patch_attention(monkeypatch, attend)
    faults = failed(backbone)
    assert {LAYERS, GRADIENTS, ROUTES, GREEDY} <= faults.keys()
    assert "too little in layers 1" in faults[LAYERS]


def test_a_prefix_that_is_cut_from_the_graph(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = attach.stack

    def detached(*args: Any) -> Any:
        made = stack(*args)
        # The last slot's keys of every layer get no gradient; the values all do.
        layers = {
            site: [(torch.cat([k[:, :, :-1], k[:, :, -1:].detach()], dim=2), v) for k, v in pairs]
            for site, pairs in made.layers.items()
        }
        return attach.Injection(made.places, layers, made.visible)

    monkeypatch.setattr(attach, "stack", detached)
    faults = failed(tiny_backbone("gpt2"))
    assert faults.keys() == {GRADIENTS}
    # Three layers, the last key slot of each of the two prefixes.
    assert "66 of 72" in faults[GRADIENTS]


def test_attention_that_sees_the_future(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(
        module: nn.Module, query: Any, key: Any, value: Any, mask: Any, *, prefix_injection: Any = None, **kwargs: Any
    ) -> Any:
        if prefix_injection is not None and prefix_injection.layers and prefix_injection.packing is None:
            mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool)
        return attach.attend(module, query, key, value, mask, prefix_injection=prefix_injection, **kwargs)

    backbone = tiny_backbone("llama")
    patch_attention(monkeypatch, attend)
    assert {CAUSALITY, PADDING, ROUTES, GREEDY} <= failed(backbone).keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cache_with_another_rows_prefix(
    dtype: torch.dtype, tiny_models: Make, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefilled = attach.prefilled_cache

    def wrong(*args: Any, **options: Any) -> Any:
        cache, visible = prefilled(*args, **options)
        for layer in cache.layers:
            if layer.is_initialized and layer.values.shape[0] > 1:
                layer.values[-1] = layer.values[0]
        return cache, visible

    monkeypatch.setattr(attach, "prefilled_cache", wrong)
    faults = failed(Backbone.from_model(tiny_models("llama").to(dtype), tiny_tokenizer, "llama"))
    assert {ROUTES, GREEDY} <= faults.keys()
    assert not {LAYERS, GRADIENTS, MIXED, PADDING} & faults.keys()


def test_beams_in_the_wrong_rows(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    prefilled = attach.prefilled_cache

    def wrong(model: Any, layout: Any, prefixes: Any, *, repeats: int = 1) -> Any:
        _, visible = prefilled(model, layout, prefixes)
        cache, _ = prefilled(model, layout, list(prefixes) * repeats)
        return cache, visible

    monkeypatch.setattr(attach, "prefilled_cache", wrong)
    assert failed(tiny_backbone("llama")).keys() == {BEAMS}


def test_generation_that_ignores_the_prefix(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    generate_ids = doctor.generate_ids

    def bare(backbone: Any, prompts: Any, prefixes: Any, **options: Any) -> Any:
        return generate_ids(backbone, prompts, [None] * len(prompts), **options)

    monkeypatch.setattr(doctor, "generate_ids", bare)
    faults = failed(tiny_backbone("gpt2"))
    assert faults.keys() == {IN_GENERATION, GREEDY, BEAMS}
    assert "by 0.0e+00" in faults[IN_GENERATION]
    assert "0 of 3 outputs differ" in faults[IN_GENERATION]


def test_generation_that_drops_the_prefilled_cache(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import DynamicCache

    prefilled = attach.prefilled_cache

    def empty(*args: Any, **options: Any) -> Any:
        _, visible = prefilled(*args, **options)
        return DynamicCache(), visible

    monkeypatch.setattr(attach, "prefilled_cache", empty)
    assert {GREEDY, BEAMS} <= failed(tiny_backbone("llama")).keys()


def test_a_cache_that_is_lost_between_steps(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefixtune import generation

    make = generation._transformers_config

    def uncached(*args: Any) -> Any:
        config = make(*args)
        config.use_cache = False
        return config

    monkeypatch.setattr(generation, "_transformers_config", uncached)
    backbone = tiny_backbone("llama")
    assert {GREEDY} <= failed(backbone).keys()


def test_padding_slots_that_are_seen(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    extend = attach.extend_mask

    def blind(mask: Any, visible: Any, prefix_length: int, key: Any, queries: int) -> Any:
        return extend(mask, None, prefix_length, key, queries)

    monkeypatch.setattr(attach, "extend_mask", blind)
    faults = failed(tiny_backbone("llama"))
    assert {MIXED, ROUTES} <= faults.keys()
    assert not {BATCH, PADDING, LAYERS} & faults.keys()


def test_padded_text_that_is_seen(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = attach.forward

    def unmasked(model: Any, layout: Any, input_ids: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return forward(model, layout, input_ids, None, **kwargs)

    monkeypatch.setattr(attach, "forward", unmasked)
    assert {PADDING, BATCH, MIXED} <= failed(tiny_backbone("llama")).keys()


def test_targets_that_see_each_other(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaky(self: attach.Group, window: int | None = None) -> torch.Tensor:
        count = self.stop - self.start
        return torch.ones(count, count, dtype=torch.bool).tril()

    monkeypatch.setattr(attach.Group, "mask", leaky)
    assert failed(tiny_backbone("llama")).keys() == {PACKING}


def test_a_window_that_hides_the_prefix_in_the_cache(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach, "visible_slots", lambda count: contextlib.nullcontext())
    assert WINDOW in failed(tiny_backbone("mistral"))
    assert failed(tiny_backbone("llama")) == {}


def test_a_window_that_hides_the_prefix_injected(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    extend = attach.extend_mask

    def windowed(mask: Any, visible: Any, prefix_length: int, key: Any, queries: int) -> Any:
        whole = extend(mask, visible, prefix_length, key, queries)
        columns = torch.arange(key.shape[2])[None, :]
        rows = torch.arange(queries)[:, None] + prefix_length
        return whole & (rows - columns < 4)

    monkeypatch.setattr(attach, "extend_mask", windowed)
    faults = failed(tiny_backbone("mistral"))
    assert "3 layers: 0 of 21 slots seen" in faults[WINDOW]


def test_dropout_left_on(tiny_backbone: Make) -> None:
    backbone = tiny_backbone("gpt2")
    backbone.model.transformer.h[1].mlp.dropout.p = 0.1
    assert failed(backbone).keys() == {EVALUATION}


def test_a_backbone_in_training_mode(tiny_backbone: Make) -> None:
    backbone = tiny_backbone("gpt2")
    backbone.model.train()
    assert "are in training mode" in failed(backbone)[EVALUATION]
    assert backbone.model.training


def test_checkpointing_that_drops_the_prefix(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointing = attach.checkpointing
    backbone = tiny_backbone("llama")

    @contextlib.contextmanager
    def dropping(model: Any) -> Iterator[None]:
        def bare(module: nn.Module, *args: Any, prefix_injection: Any = None, **kwargs: Any) -> Any:
            return attach.attend(module, *args, **kwargs)

        with checkpointing(model), pytest.MonkeyPatch.context() as inner:
            patch_attention(inner, bare)
            yield

    monkeypatch.setattr(attach, "checkpointing", dropping)
    assert CHECKPOINTING in failed(backbone)


def test_a_weight_that_moves(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone("llama")
    generate_ids = doctor.generate_ids

    def moving(*args: Any, **options: Any) -> Any:
        # One unit in the last place, where no comparison of logits would see it.
        weight = backbone.model.model.norm.weight
        weight.data[0] = torch.nextafter(weight[0], torch.tensor(9.0))
        return generate_ids(*args, **options)

    monkeypatch.setattr(doctor, "generate_ids", moving)
    faults = failed(backbone)
    assert faults.keys() == {UNTOUCHED}
    assert "model.norm.weight" in faults[UNTOUCHED]


def test_a_hook_a_patch_and_a_gradient_that_stay(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone("llama")
    generate_ids = doctor.generate_ids
    layers = backbone.model.model.layers

    def leaving(*args: Any, **options: Any) -> Any:
        layers[0].mlp.register_forward_hook(lambda *_: None)
        layers[1].mlp.forward = layers[1].mlp.forward
        layers[2].mlp.up_proj.weight.requires_grad_()
        return generate_ids(*args, **options)

    monkeypatch.setattr(doctor, "generate_ids", leaving)
    detail = failed(backbone)[UNTOUCHED]
    assert detail.startswith("3 changed")
    assert "hooks of model.layers.0.mlp" in detail
    assert "attributes of model.layers.1.mlp" in detail
    assert "gradient of model.layers.2.mlp.up_proj.weight" in detail


def test_an_error_is_a_failed_check(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise BackboneError("no cache today.\nmore of it", hint="wait.")

    monkeypatch.setattr(attach, "prefilled_cache", broken)
    faults = failed(tiny_backbone("gpt2"))
    assert faults.keys() == {ROUTES, IN_GENERATION, GREEDY, BEAMS}
    assert set(faults.values()) == {"BackboneError: no cache today."}
