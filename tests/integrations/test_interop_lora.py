"""A folder of a LoRA adapter as a backbone: its base model is found, the adapter counts, other types are refused."""

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch

import prefixtune as pt
from prefixtune.backbone.load import load_backbone
from prefixtune.errors import BackboneError, ConfigError
from prefixtune.interop.peft import export_peft
from prefixtune.prefix.fingerprint import fingerprints_match
from prefixtune.training.starts.words import from_words
from zoo import store_model

IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return Path(store_model(tmp_path_factory.mktemp("models") / "llama", "llama"))


@pytest.fixture
def make_lora(base, tmp_path):
    """Writes an adapter as PEFT does, random in its effect."""
    import transformers

    def make(name, **changes):
        settings = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "init_lora_weights": False, **changes}
        with warnings.catch_warnings():
            # PEFT asks transformers by an older name.
            warnings.simplefilter("ignore", FutureWarning)
            model = transformers.AutoModelForCausalLM.from_pretrained(base)
            torch.manual_seed(5)
            tuned = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
            tuned.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def change(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_the_folder_is_its_base_model_with_the_adapter(make_lora, base):
    import transformers

    folder = make_lora("lora")
    tuned, plain = load_backbone(folder, device="cpu"), load_backbone(base, device="cpu")
    assert tuned.name == str(folder)
    assert not any(parameter.requires_grad for parameter in tuned.model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        merged = peft.PeftModel.from_pretrained(model, folder).merge_and_unload()
    with torch.no_grad():
        wanted, found = merged(IDS).logits, tuned.forward(IDS).logits
        assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
        assert float((plain.forward(IDS).logits - wanted).abs().max()) > 1e-2
    # The same as when the two are named one by one.
    assert load_backbone(base, device="cpu", adapter=folder).fingerprint == tuned.fingerprint


def test_a_prefix_belongs_to_the_adapter(make_lora, base, tmp_path):
    from prefixtune.backbone.prefixes import make_header

    tuned = load_backbone(make_lora("lora"), device="cpu")
    made = from_words(tuned, "some words", 3)
    path = pt.save_prefix(tmp_path / "p.safetensors", pt.Prefix(made.layers, make_header(tuned)))
    assert pt.load_prefix(path, load_backbone(tmp_path / "lora", device="cpu")).equal(made)
    assert pt.generate(tuned, ["ab"], pt.load_prefix(path), max_new_tokens=3)
    with pytest.raises(BackboneError, match="other weights"):
        pt.load_prefix(path, load_backbone(base, device="cpu"))


def test_the_fingerprint_distinguishes_adapters(make_lora):
    def fingerprint(folder):
        return load_backbone(folder, device="cpu").fingerprint

    first = fingerprint(make_lora("a"))
    assert fingerprints_match(first, fingerprint(make_lora("same")))
    assert fingerprints_match(first, load_backbone(make_lora("half"), device="cpu", dtype="bfloat16").fingerprint)
    # Another effect of the same weights, and one tensor that is other.
    assert not fingerprints_match(first, fingerprint(make_lora("b", lora_alpha=8)))
    from safetensors.torch import load_file, save_file

    folder = make_lora("c")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = sorted(tensors)[7]
    save_file({**tensors, name: -tensors[name]}, folder / "adapter_model.safetensors")
    assert not fingerprints_match(first, fingerprint(folder))


def test_what_is_refused(make_lora, base, tmp_path):
    folder = make_lora("lora")
    for options in ({"adapter": folder}, {"quantize": "int8"}):
        with pytest.raises(ConfigError):
            load_backbone(folder, device="cpu", **options)
    for changes in ({"base_model_name_or_path": None}, {"base_model_name_or_path": "./nowhere"}, {"peft_type": "IA3"}):
        with pytest.raises(BackboneError):
            load_backbone(change(folder, **changes), device="cpu")
    with pytest.raises(BackboneError):
        load_backbone(base, device="cpu", adapter=folder)


def test_a_prefix_is_not_ignored_in_silence(base, tmp_path):
    backbone = load_backbone(base, device="cpu")
    adapter = export_peft(from_words(backbone, "some words", 3), tmp_path / "prefix")
    for arguments in ({"name_or_path": adapter}, {"name_or_path": base, "adapter": adapter}):
        with pytest.raises(BackboneError, match="prefixtune convert"):
            load_backbone(**arguments, device="cpu")
