"""The self-check passes on sound backbones, and every sabotage is caught by the check that should catch it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AttentionInterface

from patching import replace_everywhere
from prefixtune.attention.cache import prefilled_cache
from prefixtune.attention.forward import forward_with_prefixes, gradient_checkpointing
from prefixtune.attention.injection import Injection, batch_prefixes, current_injection, to_rows
from prefixtune.attention.kernels import packed_attention
from prefixtune.attention.packing import Group, Packing
from prefixtune.attention.registry import ATTENTION, attend, extend_mask, visible_slots
from prefixtune.backbone.backbone import Backbone
from prefixtune.cli.main import main
from prefixtune.doctor.examine import Check, examine
from prefixtune.errors import BackboneError, ConfigError
from prefixtune.inference.decoding import _transformers_config
from prefixtune.inference.generate import generate_ids
from zoo import make_model, make_tokenizer

REGISTRY = "every layer attends through the registry"
QUICKLY = "the self-check of loading passes"
OWN = "no prefix = transformers' own attention"
LAYERS = "every layer receives the prefix"
GRADIENTS = "every prefix slot receives a gradient"
SITES = "each site works alone"
ORDER = "the order of prefix positions is free"
CAUSALITY = "no token sees a later one"
ROUTES = "injected = prefilled"
PADDING = "padded = unpadded"
BATCH = "batch = single"
MIXED = "mixed prefixes = one by one"
PACKING = "packed = one pair at a time"
PAIRS = "padded pairs = one pair at a time"
LABELS = "labelled texts = one at a time"
IN_GENERATION = "generation uses the prefix"
GREEDY = "cached decoding = full recomputation"
BEAMS = "beam search = full recomputation"
WINDOW = "sliding windows keep the prefix"
EVALUATION = "dropout stays off in training mode"
CHECKPOINTING = "gradient checkpointing changes nothing"
UNTOUCHED = "the backbone is untouched"

ALL = [
    REGISTRY, QUICKLY, OWN, LAYERS, GRADIENTS, SITES, ORDER, CAUSALITY, ROUTES, PADDING, BATCH, MIXED, PACKING, PAIRS,
    LABELS, IN_GENERATION, GREEDY, BEAMS, WINDOW, EVALUATION, CHECKPOINTING, UNTOUCHED,
]  # fmt: skip
OF_ENCODER_DECODERS_ONLY = {SITES}
OF_DECODERS_ONLY = {ROUTES}
OF_GENERATION = {CAUSALITY, PACKING, PAIRS, IN_GENERATION, GREEDY, BEAMS}

Make = Callable[..., Any]


def failed(backbone: Any, **options: Any) -> dict[str, str]:
    """The names of the checks that fail, and what they say."""
    return {check.name: check.detail for check in examine(backbone, **options) if not check.passed}


def passing(backbone: Any, **options: Any) -> list[str]:
    """The names of all checks, none of which fails."""
    checks = examine(backbone, **options)
    assert [check for check in checks if not check.passed] == []
    assert all(check.detail for check in checks)
    return [check.name for check in checks]


def patch_attention(monkeypatch: pytest.MonkeyPatch, attend: Callable[..., Any]) -> None:
    """Register another attention function under this project's name, for the length of a test."""
    monkeypatch.setitem(AttentionInterface._global_mapping, ATTENTION, attend)


def barely_moved(name: str) -> Any:
    """An encoder-decoder as transformers makes it, whose encoder hardly matters to the logits."""
    tokenizer = make_tokenizer()
    tokens = {f"{part}_token_id": getattr(tokenizer, f"{part}_token_id") for part in ("bos", "eos", "pad")}
    sizes = {"encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 2}
    config = getattr(transformers, f"{name}Config")(
        **tokens,
        **sizes,
        vocab_size=len(tokenizer),
        d_model=64,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_position_embeddings=160,
        decoder_start_token_id=tokenizer.bos_token_id,
        forced_eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    return model.eval()


# --- sound backbones -------------------------------------------------------------------------------------------------


def test_every_family_passes(family: str, tiny_backbone: Make) -> None:
    left_out = OF_ENCODER_DECODERS_ONLY | (set() if family == "mistral" else {WINDOW})
    assert passing(tiny_backbone(family)) == [name for name in ALL if name not in left_out]


def test_every_encoder_decoder_passes(encoder_decoder: Any) -> None:
    left_out = OF_DECODERS_ONLY | {LABELS, WINDOW} | (set() if encoder_decoder.layout.packable else {PACKING})
    assert passing(encoder_decoder) == [name for name in ALL if name not in left_out]


def test_every_encoder_passes(encoder: Any) -> None:
    left_out = OF_ENCODER_DECODERS_ONLY | OF_DECODERS_ONLY | OF_GENERATION
    left_out |= set() if encoder.model.config.model_type == "modernbert" else {WINDOW}
    assert passing(encoder) == [name for name in ALL if name not in left_out]


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("deepseek_v3", {ROUTES, WINDOW}),  # generation injects
        ("lfm2", {ROUTES, PACKING, WINDOW}),  # rows are padded besides
        ("stablelm", {CHECKPOINTING, WINDOW}),  # the prefix travels beside the call
        ("gemma3n_text", set()),  # layers share a prefix
    ],
)
def test_peculiar_decoders_pass(name: str, left_out: set[str], tiny_tokenizer: Any) -> None:
    backbone = Backbone.from_model(make_model(name, tiny_tokenizer), tiny_tokenizer, name)
    assert passing(backbone) == [n for n in ALL if n not in left_out | OF_ENCODER_DECODERS_ONLY]


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("t5gemma", {PACKING}),  # windows in encoder and decoder
        ("longt5-local", {PACKING, WINDOW, CHECKPOINTING}),  # the encoder attends through code of its own
    ],
)
def test_peculiar_encoder_decoders_pass(name: str, left_out: set[str], tiny_tokenizer: Any) -> None:
    backbone = Backbone.from_model(make_model(name, tiny_tokenizer), tiny_tokenizer, name)
    assert passing(backbone) == [n for n in ALL if n not in left_out | OF_DECODERS_ONLY | {LABELS}]


def test_a_first_token_that_is_forced(tiny_backbone: Make) -> None:
    assert GREEDY in passing(tiny_backbone("bart", forced_bos_token_id=7))


def test_a_tokenizer_without_an_end_token(tiny_models: Make) -> None:
    tokenizer = make_tokenizer(enclosing=True)
    backbone = Backbone.from_model(tiny_models("bert"), tokenizer, "bert")
    tokenizer.eos_token = None
    assert MIXED in passing(backbone)


def test_unused_weights_are_listed(
    tiny_models: Make, enclosing_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers.BertForMaskedLM(tiny_models("bert").config).save_pretrained(tmp_path)
    enclosing_tokenizer.save_pretrained(tmp_path)
    main(["doctor", str(tmp_path), "--device", "cpu", "--quiet"])
    assert "weights of the checkpoint are not used: cls.predictions." in capsys.readouterr().out
    main(["doctor", str(tmp_path), "--device", "cpu", "--quiet", "--json"])
    unused = json.loads(capsys.readouterr().out)["unused_weights"]
    assert "cls.predictions.transform.dense.weight" in unused
    assert all(name.startswith("cls.") for name in unused)


def test_every_check_is_told(tiny_backbone: Make) -> None:
    told: list[Check] = []
    assert examine(tiny_backbone("gpt2"), on_check=told.append) == told


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_half_precision_passes(name: str, dtype: torch.dtype, tiny_models: Make, tiny_tokenizer: Any) -> None:
    checks = examine(Backbone.from_model(tiny_models(name).to(dtype), tiny_tokenizer, name))
    assert [c for c in checks if not c.passed] == []
    bound = "0.05" if dtype == torch.bfloat16 else "0.01"
    assert f"at most {bound}" in next(c.detail for c in checks if c.name == GREEDY)


@pytest.mark.parametrize("name", ["bart", "t5", "bert"])
def test_bfloat16_passes_for_other_kinds(name: str, tiny_models: Make, tiny_tokenizer: Any) -> None:
    names = passing(Backbone.from_model(tiny_models(name).to(torch.bfloat16), tiny_tokenizer, name))
    assert OWN not in names


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
    assert "strength 1)" not in next(c.detail for c in checks if c.name == LAYERS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Bart", "Pegasus"])
def test_sound_models_whose_logits_hardly_move_pass(name: str, dtype: torch.dtype, tiny_tokenizer: Any) -> None:
    backbone = Backbone.from_model(barely_moved(name).to(dtype), tiny_tokenizer, name)
    assert LAYERS in passing(backbone)


@pytest.mark.parametrize(("site", "number"), [("encoder", 2), ("decoder", 0), ("cross", 1)])
def test_one_dead_layer_of_a_model_whose_logits_hardly_move(
    site: str, number: int, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def patched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        injection = kwargs.get("prefix_injection") or current_injection.get()
        if injection is not None and injection.layers and injection.layer_of[module] == (site, number):
            kwargs["prefix_injection"] = Injection({})
        return attend(module, *args, **kwargs)

    backbone = Backbone.from_model(barely_moved("Bart"), tiny_tokenizer, "bart")
    patch_attention(monkeypatch, patched)
    faults = failed(backbone)
    assert faults[LAYERS].endswith(f"too little in layers {site} {number}")
    assert {GRADIENTS, SITES} <= faults.keys()


def test_a_window_in_some_layers_only(tiny_backbone: Make) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    backbone = tiny_backbone("qwen3", use_sliding_window=True, sliding_window=4, layer_types=kinds)
    checks = {c.name: c for c in examine(backbone)}
    assert all(c.passed for c in checks.values())
    assert "window 4: 21 of 21 slots" in checks[WINDOW].detail


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


@pytest.mark.parametrize(("name", "longest"), [("gpt2", 134), ("bart", 158), ("bert", 158)])
@pytest.mark.parametrize("length", [0, -1, 159, 10_000])
def test_a_length_that_leaves_no_room_is_refused(name: str, longest: int, length: int, tiny_backbone: Make) -> None:
    with pytest.raises(ConfigError, match=f"between 1 and {longest}"):
        examine(tiny_backbone(name), prefix_length=length)


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
    def patched(module: nn.Module, *args: Any, prefix_injection: Any = None, **kwargs: Any) -> Any:
        if prefix_injection is not None and prefix_injection.layers and prefix_injection.layer_of[module][1] == 1:
            prefix_injection = None
        return attend(module, *args, prefix_injection=prefix_injection, **kwargs)

    backbone = tiny_backbone("llama")
    patch_attention(monkeypatch, patched)
    faults = failed(backbone)
    assert {LAYERS, GRADIENTS, ROUTES, GREEDY} <= faults.keys()
    assert "too little in layers 1" in faults[LAYERS]


def test_a_prefix_that_is_cut_from_the_graph(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = batch_prefixes

    def detached(*args: Any) -> Any:
        made = stack(*args)
        # The last slot's keys of every layer get no gradient; the values all do.
        layers = {
            site: [(torch.cat([k[:, :, :-1], k[:, :, -1:].detach()], dim=2), v) for k, v in pairs]
            for site, pairs in made.layers.items()
        }
        return Injection(made.layer_of, layers, made.visible)

    replace_everywhere(monkeypatch, batch_prefixes, detached)
    faults = failed(tiny_backbone("gpt2"))
    assert faults.keys() == {GRADIENTS}
    # Three layers, the last key slot of each of the two prefixes.
    assert "66 of 72" in faults[GRADIENTS]


def test_attention_that_sees_the_future(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def patched(
        module: nn.Module, query: Any, key: Any, value: Any, mask: Any, *, prefix_injection: Any = None, **kwargs: Any
    ) -> Any:
        if prefix_injection is not None and prefix_injection.layers and prefix_injection.packing is None:
            mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool)
        return attend(module, query, key, value, mask, prefix_injection=prefix_injection, **kwargs)

    backbone = tiny_backbone("llama")
    patch_attention(monkeypatch, patched)
    assert {CAUSALITY, PADDING, ROUTES, GREEDY} <= failed(backbone).keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cache_with_another_rows_prefix(
    dtype: torch.dtype, tiny_models: Make, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefilled = prefilled_cache

    def wrong(*args: Any, **options: Any) -> Any:
        cache, visible = prefilled(*args, **options)
        for layer in cache.layers:
            if layer.is_initialized and layer.values.shape[0] > 1:
                layer.values[-1] = layer.values[0]
        return cache, visible

    replace_everywhere(monkeypatch, prefilled_cache, wrong)
    faults = failed(Backbone.from_model(tiny_models("llama").to(dtype), tiny_tokenizer, "llama"))
    assert {ROUTES, GREEDY} <= faults.keys()
    assert not {LAYERS, GRADIENTS, MIXED, PADDING} & faults.keys()


def test_beams_in_the_wrong_rows(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    prefilled = prefilled_cache

    def wrong(model: Any, layout: Any, prefixes: Any, *, repeats: int = 1, **options: Any) -> Any:
        _, visible = prefilled(model, layout, prefixes, **options)
        cache, _ = prefilled(model, layout, list(prefixes) * repeats, **options)
        return cache, visible

    replace_everywhere(monkeypatch, prefilled_cache, wrong)
    assert failed(tiny_backbone("llama")).keys() == {BEAMS}


def test_generation_that_ignores_the_prefix(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:

    def bare(backbone: Any, prompts: Any, prefixes: Any, **options: Any) -> Any:
        return generate_ids(backbone, prompts, [None] * len(prompts), **options)

    monkeypatch.setattr("prefixtune.doctor.reference.generate_ids", bare)
    faults = failed(tiny_backbone("gpt2"))
    assert faults.keys() == {IN_GENERATION, GREEDY, BEAMS}
    assert "by 0.0e+00" in faults[IN_GENERATION]
    assert "0 of 3 outputs differ" in faults[IN_GENERATION]


def test_generation_that_drops_the_prefilled_cache(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import DynamicCache

    prefilled = prefilled_cache

    def empty(*args: Any, **options: Any) -> Any:
        _, visible = prefilled(*args, **options)
        return DynamicCache(), visible

    replace_everywhere(monkeypatch, prefilled_cache, empty)
    assert {GREEDY, BEAMS} <= failed(tiny_backbone("llama")).keys()


def test_a_cache_that_is_lost_between_steps(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:

    make = _transformers_config

    def uncached(*args: Any) -> Any:
        config = make(*args)
        config.use_cache = False
        return config

    replace_everywhere(monkeypatch, _transformers_config, uncached)
    backbone = tiny_backbone("llama")
    assert {GREEDY} <= failed(backbone).keys()


def test_padding_slots_that_are_seen(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    extend = extend_mask

    def blind(mask: Any, visible: Any, prefix_length: int, key: Any, queries: int) -> Any:
        return extend(mask, None, prefix_length, key, queries)

    replace_everywhere(monkeypatch, extend_mask, blind)
    faults = failed(tiny_backbone("llama"))
    assert {MIXED, ROUTES} <= faults.keys()
    assert not {BATCH, PADDING, LAYERS} & faults.keys()


def test_padded_text_that_is_seen(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = forward_with_prefixes

    def unmasked(model: Any, layout: Any, input_ids: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return forward(model, layout, input_ids, None, **kwargs)

    replace_everywhere(monkeypatch, forward_with_prefixes, unmasked)
    assert {PADDING, BATCH, MIXED} <= failed(tiny_backbone("llama")).keys()


def test_targets_that_see_each_other(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaky(self: Group, window: int | None = None) -> torch.Tensor:
        count = self.stop - self.start
        return torch.ones(count, count, dtype=torch.bool).tril()

    monkeypatch.setattr(Group, "mask", leaky)
    assert failed(tiny_backbone("llama")).keys() == {PACKING}


def test_a_window_that_hides_the_prefix_in_the_cache(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_everywhere(monkeypatch, visible_slots, lambda count: contextlib.nullcontext())
    assert WINDOW in failed(tiny_backbone("mistral"))
    assert failed(tiny_backbone("llama")) == {}


def test_a_window_that_hides_the_prefix_injected(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    extend = extend_mask

    def windowed(mask: Any, visible: Any, prefix_length: int, key: Any, queries: int) -> Any:
        whole = extend(mask, visible, prefix_length, key, queries)
        columns = torch.arange(key.shape[2])[None, :]
        rows = torch.arange(queries)[:, None] + prefix_length
        return whole & (rows - columns < 4)

    replace_everywhere(monkeypatch, extend_mask, windowed)
    faults = failed(tiny_backbone("mistral"))
    assert "0 of 21 slots seen" in faults[WINDOW]


def test_a_window_that_hides_the_prefix_in_one_layer(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def patched(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        injection = kwargs.get("prefix_injection")
        if injection is not None and injection.layers and injection.layer_of[module] == ("encoder", 1):
            # With the window the prefix is out of sight of the last position, in this layer alone.
            visible = torch.arange(query.shape[2]) < query.shape[2] - 1
            out, _ = attend(module, query, key, value, mask, **kwargs)
            other, _ = attend(module, query, key, value, mask, **{**kwargs, "prefix_injection": None})
            return torch.where(visible[:, None, None], out, other), None
        return attend(module, query, key, value, mask, **kwargs)

    backbone = tiny_backbone("modernbert")
    patch_attention(monkeypatch, patched)
    assert "14 of 21 slots seen" in failed(backbone)[WINDOW]


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
    checkpointing = gradient_checkpointing
    backbone = tiny_backbone("llama")

    @contextlib.contextmanager
    def dropping(model: Any) -> Iterator[None]:
        def bare(module: nn.Module, *args: Any, prefix_injection: Any = None, **kwargs: Any) -> Any:
            return attend(module, *args, **kwargs)

        with checkpointing(model), pytest.MonkeyPatch.context() as inner:
            patch_attention(inner, bare)
            yield

    replace_everywhere(monkeypatch, gradient_checkpointing, dropping)
    assert CHECKPOINTING in failed(backbone)


def test_a_weight_that_moves(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone("llama")

    def moving(*args: Any, **options: Any) -> Any:
        # One unit in the last place, where no comparison of logits would see it.
        weight = backbone.model.model.norm.weight
        weight.data[0] = torch.nextafter(weight[0], torch.tensor(9.0))
        return generate_ids(*args, **options)

    monkeypatch.setattr("prefixtune.doctor.reference.generate_ids", moving)
    faults = failed(backbone)
    assert faults.keys() == {UNTOUCHED}
    assert "model.norm.weight" in faults[UNTOUCHED]


def test_a_hook_a_patch_and_a_gradient_that_stay(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone("llama")
    layers = backbone.model.model.layers

    def leaving(*args: Any, **options: Any) -> Any:
        layers[0].mlp.register_forward_hook(lambda *_: None)
        layers[1].mlp.forward = layers[1].mlp.forward
        layers[2].mlp.up_proj.weight.requires_grad_()
        return generate_ids(*args, **options)

    monkeypatch.setattr("prefixtune.doctor.reference.generate_ids", leaving)
    detail = failed(backbone)[UNTOUCHED]
    assert detail.startswith("3 changed")
    assert "hooks of model.layers.0.mlp" in detail
    assert "attributes of model.layers.1.mlp" in detail
    assert "gradient of model.layers.2.mlp.up_proj.weight" in detail


def test_a_weight_that_is_to_be_trained_is_left_alone(tiny_backbone: Make) -> None:
    backbone = tiny_backbone("llama")
    weight = backbone.model.model.norm.weight.requires_grad_()
    assert UNTOUCHED in passing(backbone)
    assert weight.grad is None


def test_an_error_is_a_failed_check(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise BackboneError("no cache today.\nmore of it", hint="wait.")

    replace_everywhere(monkeypatch, prefilled_cache, broken)
    faults = failed(tiny_backbone("gpt2"))
    assert faults.keys() == {QUICKLY, ROUTES, IN_GENERATION, GREEDY, BEAMS}
    assert set(faults.values()) == {"BackboneError: no cache today."}


# --- sabotage of encoder-decoders and encoders -----------------------------------------------------------------------


def of_site(site: str, change: Callable[[dict[str, Any]], None]) -> Callable[..., Any]:
    """The attention function, with the arguments changed at one site; packed rows are left alone."""

    def patched(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        # In generation the prefix travels beside the call.
        injection = kwargs.get("prefix_injection") or current_injection.get()
        given = {"query": query, "key": key, "value": value, "attention_mask": mask, **kwargs}
        if injection is not None and injection.packing is None and injection.layer_of.get(module, ("",))[0] == site:
            change(given)
        return attend(module, **given)

    return patched


def bare(given: dict[str, Any]) -> None:
    injection = given.get("prefix_injection")
    if injection is None or injection.recorded is None:
        given["prefix_injection"] = Injection({})


def sees_all(given: dict[str, Any]) -> None:
    given["attention_mask"] = torch.ones(1, 1, given["query"].shape[2], given["key"].shape[2], dtype=torch.bool)


@pytest.mark.parametrize("name", ["bart", "t5"])
@pytest.mark.parametrize("site", ["encoder", "decoder", "cross"])
def test_a_dead_site(site: str, name: str, tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone(name)
    count = len(backbone.geometry[site])
    patch_attention(monkeypatch, of_site(site, bare))
    faults = failed(backbone)
    assert {LAYERS, GRADIENTS, SITES} <= faults.keys()
    assert faults[LAYERS].endswith(f"too little in layers {', '.join(f'{site} {n}' for n in range(count))}")
    assert f"{site} 0.0e+00, 0 of {2 * count * 5} slots" in faults[SITES]


def test_a_site_that_is_dead_in_generation_only(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(given: dict[str, Any]) -> None:
        if "prefix_injection" not in given:
            bare(given)

    backbone = tiny_backbone("bart")
    patch_attention(monkeypatch, of_site("cross", change))
    assert failed(backbone).keys() == {QUICKLY, GREEDY, BEAMS}


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_decoder_that_sees_the_future(name: str, tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone(name)
    patch_attention(monkeypatch, of_site("decoder", sees_all))
    assert {OWN, CAUSALITY, PADDING, BATCH, PACKING, GREEDY} <= failed(backbone).keys()


@pytest.mark.parametrize("name", ["bart", "t5"])
@pytest.mark.parametrize("site", ["encoder", "cross"])
def test_padded_sources_that_are_seen(
    site: str, name: str, tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny_backbone(name)
    patch_attention(monkeypatch, of_site(site, sees_all))
    faults = failed(backbone)
    assert {OWN, PADDING, BATCH, MIXED, PAIRS, GREEDY} <= faults.keys()
    assert not {LAYERS, GRADIENTS, SITES, CAUSALITY, PACKING} & faults.keys()


def test_a_relative_bias_that_is_shifted(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pad = nn.functional.pad

    def shifted(tensor: torch.Tensor, sizes: tuple[int, ...], *args: Any, **options: Any) -> torch.Tensor:
        return pad(tensor, sizes[::-1] if len(sizes) == 2 else sizes, *args, **options)

    backbone = tiny_backbone("t5")
    monkeypatch.setattr(torch.nn.functional, "pad", shifted)
    faults = failed(backbone)
    assert {ORDER, MIXED, GREEDY} <= faults.keys()
    assert not {OWN, LAYERS, GRADIENTS, SITES} & faults.keys()


def test_a_relative_bias_that_the_prefix_carries(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pad = nn.functional.pad

    def biased(tensor: torch.Tensor, sizes: tuple[int, ...], *args: Any, **options: Any) -> torch.Tensor:
        if len(sizes) != 2 or tensor.dim() != 4:
            return pad(tensor, sizes, *args, **options)
        # The later a prefix position, the more it weighs.
        columns = torch.arange(sizes[0]).to(tensor).expand(*tensor.shape[:-1], -1)
        return torch.cat([columns, tensor], dim=-1)

    backbone = tiny_backbone("t5")
    monkeypatch.setattr(torch.nn.functional, "pad", biased)
    assert ORDER in failed(backbone)


def test_packed_targets_that_look_at_another_source(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Packing.sizes

    def turned(self: Packing, site: str) -> Any:
        ours, theirs = sizes(self, site)
        return (ours, theirs[::-1]) if site == "cross" else (ours, theirs)

    monkeypatch.setattr(Packing, "sizes", turned)
    assert failed(tiny_backbone("bart")).keys() == {PACKING}


def test_padded_targets_that_look_at_another_source(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = forward_with_prefixes

    def turned(*args: Any, source_rows: Any = None, **kwargs: Any) -> Any:
        rows = None if source_rows is None else source_rows.flip(0)
        return forward(*args, source_rows=rows, **kwargs)

    replace_everywhere(monkeypatch, forward_with_prefixes, turned)
    assert failed(tiny_backbone("bart")).keys() == {PAIRS}


def test_packed_rows_whose_gradient_is_lost(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = packed_attention

    def cut(packing: Any, site: str, fronts: Any, *args: Any) -> Any:
        fronts = [None if front is None else (front[0].detach(), front[1]) for front in fronts]
        return packed(packing, site, fronts, *args)

    replace_everywhere(monkeypatch, packed_attention, cut)
    assert failed(tiny_backbone("llama")).keys() == {PACKING}
    assert failed(tiny_backbone("t5")).keys() == {PACKING}


def test_beams_with_another_rows_prefix(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def turned(given: torch.Tensor, rows: int) -> torch.Tensor:
        if given.shape[0] == 1:
            return given.expand(rows, *given.shape[1:])
        return given.repeat(rows // given.shape[0], *[1] * (given.dim() - 1))

    replace_everywhere(monkeypatch, to_rows, turned)
    assert failed(tiny_backbone("bart")).keys() == {BEAMS}


def test_attention_that_is_not_the_models_own(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(given: dict[str, Any]) -> None:
        given["query"] = given["query"] * 1.1

    backbone = tiny_backbone("bert")
    patch_attention(monkeypatch, of_site("encoder", change))
    assert failed(backbone).keys() == {OWN}
    assert backbone.model.config._attn_implementation == ATTENTION


def test_an_encoder_that_ignores_the_prefix(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone("bert")
    patch_attention(monkeypatch, of_site("encoder", bare))
    assert failed(backbone).keys() == {QUICKLY, LAYERS, GRADIENTS}


def test_an_encoder_that_sees_padding(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone("bert")
    patch_attention(monkeypatch, of_site("encoder", sees_all))
    assert failed(backbone).keys() == {QUICKLY, OWN, PADDING, BATCH, MIXED, LABELS}


def test_an_encoder_with_another_rows_prefix(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = batch_prefixes

    def turned(prefixes: Any, *args: Any) -> Any:
        return stack(list(prefixes)[::-1], *args)

    replace_everywhere(monkeypatch, batch_prefixes, turned)
    assert MIXED in failed(tiny_backbone("bert"))


def test_an_encoder_whose_training_mode_drops(tiny_backbone: Make) -> None:
    backbone = tiny_backbone("bert")
    backbone.model.encoder.layer[1].output.dropout.p = 0.1
    assert failed(backbone).keys() == {EVALUATION}


@pytest.mark.parametrize("name", ["bart", "bert"])
def test_another_attention_function_in_other_kinds(name: str, tiny_backbone: Make) -> None:
    backbone = tiny_backbone(name)
    backbone.model.set_attn_implementation("eager")
    faults = failed(backbone)
    assert faults.keys() == {REGISTRY}
    assert "no layer attends" in faults[REGISTRY]
