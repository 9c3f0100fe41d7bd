"""Backbones that are quantized, spread over memory and disk, or tuned by LoRA."""

import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import prefixtune as pt
from prefixtune.backbone.load import load_backbone
from prefixtune.data import Example
from prefixtune.errors import BackboneError, ConfigError
from prefixtune.training.config import TrainConfig
from prefixtune.training.starts.words import from_words
from zoo import store_model

IDS = torch.tensor([[5, 6, 7, 8, 9]])
EXAMPLES = [Example(f"a {n}", (f"b {n}",)) for n in range(4)]


@pytest.fixture
def folder(tmp_path):
    return Path(store_model(tmp_path / "llama", "llama"))


def gradients(backbone, prefix):
    leaf = prefix.leaves()
    backbone.forward(IDS, prefixes=leaf).logits.float().logsumexp(-1).sum().backward()
    return [tensor.grad for tensor in leaf.tensors()]


def distance(one, other):
    return float((one.float() - other.float()).norm() / other.float().norm())


# --- quantized -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "near"), [("int8", 0.05), ("int4", 0.5)])
def test_quantized_weights_keep_the_prefix_and_its_gradients(folder, kind, near):
    plain, rounded = load_backbone(folder, device="cpu"), load_backbone(folder, device="cpu", quantize=kind)
    prefix = from_words(plain, "some words", 5)
    with torch.no_grad():
        wanted = plain.forward(IDS, prefixes=prefix).logits
        found = rounded.forward(IDS, prefixes=prefix).logits
        bare = rounded.forward(IDS).logits
    assert 0 < distance(found, wanted) < near
    assert distance(found, bare) > 0.05
    one, other = (torch.cat([g.flatten() for g in gradients(b, prefix)]) for b in (rounded, plain))
    assert distance(one, other) < 3 * near
    # A prefix belongs to the weights before rounding.
    assert rounded.fingerprint == plain.fingerprint
    assert pt.generate(rounded, ["ab"], prefix, max_new_tokens=4)


# --- spread ----------------------------------------------------------------------------------------------------------


def test_layers_on_disk_compute_the_same(folder, tmp_path):
    plain = load_backbone(folder, device="cpu")
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    spread = load_backbone(folder, device_map=places, offload_folder=str(tmp_path / "offload"))
    assert any(parameter.device.type == "meta" for parameter in spread.model.parameters())
    assert spread.fingerprint == plain.fingerprint
    prefix = from_words(spread, "some words", 5)
    assert prefix.equal(from_words(plain, "some words", 5))
    for got, want in zip(gradients(spread, prefix), gradients(plain, prefix), strict=True):
        assert distance(got, want) < 1e-6
    assert pt.generate(spread, ["ab"], prefix, max_new_tokens=4) == pt.generate(plain, ["ab"], prefix, max_new_tokens=4)


# --- LoRA ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def lora(tiny_models, tmp_path):
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    path = tmp_path / "lora"
    with warnings.catch_warnings():
        # PEFT asks transformers by an older name.
        warnings.simplefilter("ignore", FutureWarning)
        peft.get_peft_model(tiny_models("llama"), config).save_pretrained(path)
    return path


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_an_adapter_that_lacks_weights_is_refused(folder, lora):
    file = lora / "adapter_model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if "layers.1.mlp" not in name}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=r"lacks 6 weights .*layers\.1\.mlp"):
        load_backbone(folder, device="cpu", adapter=lora)


def test_a_run_goes_on_as_quantized_as_it_began(folder, tmp_path):
    options = {"dtype": "float32", "device": "cpu", "output": str(tmp_path / "run"), "max_steps": 1}
    rounded = load_backbone(folder, device="cpu", quantize="int8")
    pt.train(TrainConfig(**options), backbone=rounded, examples=EXAMPLES)
    again = {"resume": True, "output": options["output"], "examples": EXAMPLES}
    with pytest.raises(ConfigError, match="quantize"):
        pt.train(**again)
    assert pt.train(**again, backbone=load_backbone(folder, device="cpu", quantize="int8")).events
