"""The backbone: what is read from it, its fingerprint, and every model that is refused."""

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from prefixtune.backbone.backbone import Backbone, fingerprint
from prefixtune.backbone.load import load_backbone
from prefixtune.errors import BackboneError
from prefixtune.prefix.fingerprint import fingerprints_match, sample_weights
from prefixtune.prefix.geometry import LayerShape

SHAPES = {"gpt2": (4, 8), "llama": (2, 8), "opt": (4, 8), "gpt_neox": (4, 8), "qwen3": (2, 16), "mistral": (2, 8)}


@pytest.fixture
def folder(tmp_path, save_model):
    """A tiny model in transformers' format."""
    return save_model(tmp_path / "tiny")


def test_the_geometry_is_found_by_running_it(family, backbone):
    heads, size = SHAPES[family]
    assert backbone.geometry == {"decoder": (LayerShape(heads, size, size),) * 3}
    assert backbone.hidden_size == 32
    assert backbone.max_positions == 160
    assert family in repr(backbone)


def test_it_comes_frozen_and_without_dropout(backbone):
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert not any(module.training for module in backbone.model.modules())
    rates = [module.p for module in backbone.model.modules() if isinstance(module, torch.nn.Dropout)]
    assert not any(rates)


# --- the fingerprint -------------------------------------------------------------------------------------------------


def test_the_fingerprint_does_not_depend_on_the_dtype(tiny_backbone):
    backbone = tiny_backbone("llama")
    model = copy.deepcopy(backbone.model)
    for dtype in (torch.bfloat16, torch.float16):
        model.to(dtype)
        assert fingerprints_match(backbone.fingerprint, fingerprint(model, backbone.geometry))
        assert fingerprints_match(fingerprint(model, backbone.geometry), backbone.fingerprint)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_weights_too_small_for_float16_do_not_change_the_fingerprint(stored):
    def printed(dtype):
        return "x:" + sample_weights([("w", len(weights))], lambda _, index: weights.to(stored).to(dtype)[index])

    for size in (1e-4, 1e-5, 1e-6, 1e-7, 1e-9):
        weights = torch.randn(256, generator=torch.Generator().manual_seed(0)) * 0.02
        weights[::8] *= size
        half = printed(torch.float16)
        assert fingerprints_match(printed(torch.float32), half)
        assert fingerprints_match(half, printed(torch.bfloat16))
        weights[1::2] *= 1.01
        assert not fingerprints_match(printed(torch.float32), half)


def test_a_fine_tune_of_one_layer_changes_the_fingerprint(tiny_backbone):
    backbone = tiny_backbone("llama")
    model = copy.deepcopy(backbone.model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.05)
    assert not fingerprints_match(backbone.fingerprint, fingerprint(model, backbone.geometry))


def test_another_model_has_another_fingerprint(tiny_backbone):
    one = tiny_backbone("llama")
    assert one.fingerprint == tiny_backbone("llama").fingerprint
    for other in (
        tiny_backbone("llama", seed=1),
        tiny_backbone("mistral"),
        tiny_backbone("llama", num_hidden_layers=2),
    ):
        assert not fingerprints_match(one.fingerprint, other.fingerprint)


@pytest.mark.parametrize("text", ["", "x:!!!", "x:AAA"])
def test_what_is_no_fingerprint_matches_nothing(text, tiny_backbone):
    assert not fingerprints_match(text, tiny_backbone("gpt2").fingerprint)
    assert not fingerprints_match(text, tiny_backbone("gpt2").fingerprint.partition(":")[0] + ":")


# --- loading ---------------------------------------------------------------------------------------------------------


def test_pickled_weights_are_not_loaded(folder, tiny_models):
    (folder / "model.safetensors").unlink()
    torch.save(tiny_models("llama").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(BackboneError, match="cannot load the backbone"):
        load_backbone(folder)


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(BackboneError, match="is neither a folder of a model") as error:
        load_backbone(tmp_path / "none")
    assert error.value.hint
    (tmp_path / "empty").mkdir()
    with pytest.raises(BackboneError, match="is neither a folder of a model"):
        load_backbone(tmp_path / "empty")
    with pytest.raises(BackboneError, match="cannot load the backbone 'no-such-org/no-such-model'"):
        load_backbone("no-such-org/no-such-model")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(BackboneError, match="cannot load the backbone"):
        load_backbone(folder)


def test_a_tokenizer_without_an_end_token_is_refused(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("eos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match="no end-of-sequence token"):
        load_backbone(folder)


def test_the_embedded_backbone_must_be_prepared(monkeypatch):
    monkeypatch.setattr("prefixtune.backbone.checkpoint.pretrained_folder", lambda _: None)
    with pytest.raises(BackboneError, match="not prepared on this machine") as error:
        load_backbone()
    assert "prefixtune prepare" in error.value.hint


# --- checkpoints that lack weights -----------------------------------------------------------------------------------


def edit_weights(folder, change):
    """Pass the tensors of a stored model through a function."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def without(*parts):
    return lambda tensors: {name: t for name, t in tensors.items() if not any(part in name for part in parts)}


def store(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_missing_weights_are_refused_by_name(folder):
    edit_weights(folder, without("lm_head"))
    with pytest.raises(BackboneError, match=r": lm_head\.weight\.") as error:
        load_backbone(folder, device="cpu")
    assert "whole checkpoint" in error.value.hint
    edit_weights(folder, without("layers.1."))
    with pytest.raises(BackboneError, match=r"layers\.1\.input_layernorm\.weight, .* and 5 more\."):
        load_backbone(folder, device="cpu")


def test_tied_weights_are_not_missing(tiny_models, tiny_tokenizer, tmp_path):
    model = tiny_models("bart", tie_word_embeddings=True)
    loaded = load_backbone(store(tmp_path, model, tiny_tokenizer), device="cpu")
    assert torch.equal(loaded.model.get_output_embeddings().weight, model.get_input_embeddings().weight)


def test_a_missing_pooler_is_left_out(tiny_models, enclosing_tokenizer, tmp_path):
    expected = load_backbone(store(tmp_path / "whole", tiny_models("bert"), enclosing_tokenizer), device="cpu")
    folder = store(tmp_path / "part", tiny_models("bert"), enclosing_tokenizer)
    edit_weights(folder, without("pooler"))
    one, other = load_backbone(folder, device="cpu"), load_backbone(folder, device="cpu")
    assert not any("pooler" in name for name, _ in one.model.named_parameters())
    assert one.fingerprint == other.fingerprint
    ids = torch.tensor([one.encode("Some text.")])
    assert torch.equal(one.hidden_states(ids), expected.hidden_states(ids))
    edit_weights(folder, without("layer.1."))
    with pytest.raises(BackboneError, match=r": encoder\.layer\.1\."):
        load_backbone(folder, device="cpu")


def test_weights_without_a_use_are_listed(tiny_models, enclosing_tokenizer, tmp_path):
    model = transformers.RobertaForMaskedLM(tiny_models("roberta").config)
    backbone = load_backbone(store(tmp_path, model, enclosing_tokenizer), device="cpu")
    assert "lm_head.dense.weight" in backbone.unused_weights
    assert all(name.startswith("lm_head.") for name in backbone.unused_weights)


# --- models that cannot carry a prefix -------------------------------------------------------------------------------

REFUSED = {
    # It attends by code of its own.
    "bloom": lambda: transformers.BloomConfig(vocab_size=105, hidden_size=32, n_layer=2, n_head=4),
    # It attends twice with the same keys, to two values.
    "diffllama": lambda: transformers.DiffLlamaConfig(
        vocab_size=105, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_carry_a_prefix_is_refused(name, tiny_tokenizer):
    model = transformers.AutoModelForCausalLM.from_config(REFUSED[name]())
    with pytest.raises(BackboneError) as error:
        Backbone.from_model(model, tiny_tokenizer, name)
    assert error.value.hint


def test_weights_that_compute_nan_are_named(tiny_models, tiny_tokenizer):
    model = tiny_models("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = torch.nan
    with pytest.raises(BackboneError, match="NaN"):
        Backbone.from_model(model, tiny_tokenizer, "damaged")
