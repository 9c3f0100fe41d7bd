"""A backbone that is loaded the quick way is the one that transformers' own loader and a probe give."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import prefixtune.backbone.checkpoint as checkpoint
import prefixtune.backbone.known_layouts as known_layouts
from prefixtune.backbone.checkpoint import auto_class
from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.plain import PLAIN_TYPES, load_plain, read_ahead
from prefixtune.errors import BackboneError
from zoo import ZOO, make_model

PLAIN_ENTRIES = sorted(name for name, entry in ZOO.items() if entry.model_type in PLAIN_TYPES)


@pytest.fixture
def folder(tmp_path: Path, tiny_models: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model's folder; what is remembered goes to a folder of its own."""
    monkeypatch.setenv("PREFIXTUNE_HOME", str(tmp_path / "home"))
    tiny_models("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def plain(folder: Path, dtype: torch.dtype) -> Any:
    """A folder's model, as `read_checkpoint` loads it."""
    config, weights = AutoConfig.from_pretrained(folder), read_ahead(folder, dtype)
    assert weights is not None
    return load_plain(auto_class(config), config, dtype, weights.result())


def test_every_plain_type_is_tried() -> None:
    assert {ZOO[name].model_type for name in PLAIN_ENTRIES} == PLAIN_TYPES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PLAIN_ENTRIES)
def test_a_plain_checkpoint_is_what_transformers_loads(
    name: str, dtype: torch.dtype, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    make_model(name, tiny_tokenizer).save_pretrained(tmp_path)
    made = plain(tmp_path, dtype)
    expected = auto_class(made.config).from_pretrained(tmp_path, dtype=dtype)
    for tensors, others in (
        (made.named_parameters(), expected.named_parameters()),
        (made.named_buffers(), expected.named_buffers()),
    ):
        ours, theirs = dict(tensors), dict(others)
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert tensor.dtype == theirs[key].dtype
            assert torch.equal(tensor, theirs[key]), key
    ours, theirs = made.config.to_dict(), expected.config.to_dict()
    assert {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)} <= {"_name_or_path"}
    assert made.config._attn_implementation == expected.config._attn_implementation
    assert not made.training
    ids = torch.arange(3, 9)[None]
    assert torch.equal(made(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("change", ["missing", "more", "shape", "truncated", "quantized", "type"])
def test_any_other_checkpoint_goes_to_the_general_loader(change: str, folder: Path) -> None:
    file, config = folder / "model.safetensors", folder / "config.json"
    tensors, settings = load_file(file), json.loads(config.read_text())
    name = next(name for name in tensors if "norm" in name)
    match change:
        case "missing":
            del tensors[name]
        case "more":
            tensors["other.weight"] = torch.ones(2)
        case "shape":
            tensors[name] = torch.ones(3)
        case "quantized":
            settings["quantization_config"] = {"quant_method": "torchao"}
        case "type":
            settings["model_type"] = "falcon"
    save_file(tensors, file, {"format": "pt"})
    config.write_text(json.dumps(settings))
    if change == "truncated":
        file.write_bytes(file.read_bytes()[:-40])
    ahead = read_ahead(folder, torch.float32)
    if change in ("quantized", "type"):
        assert ahead is None
        return
    assert plain(folder, torch.float32) is None
    if change == "more":
        assert load_backbone(folder).unused_weights == ("other.weight",)
    else:
        with pytest.raises(BackboneError, match=r"cannot load|does not hold all weights"):
            load_backbone(folder)


def test_the_quick_way_is_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_load_model", lambda *given: pytest.fail("the general loader was used"))
    load_backbone(folder)


def described(backbone: Any) -> dict[str, Any]:
    """Everything that is known of a backbone's layout."""
    layout, modules = backbone.layout, backbone.model.named_modules()
    values = {field.name: getattr(layout, field.name) for field in fields(layout) if field.name != "layer_of"}
    places = {name: layout.layer_of[module] for name, module in modules if module in layout.layer_of}
    return {**values, "layer_of": places, "fingerprint": backbone.fingerprint}


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "gemma3_text"])
def test_a_model_is_probed_once(
    name: str, tmp_path: Path, tiny_models: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFIXTUNE_HOME", str(tmp_path / "home"))
    tiny_models(name).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    first = load_backbone(tmp_path / "model", dtype="float32")
    monkeypatch.setattr(known_layouts, "probe", lambda *given: pytest.fail("it was probed again"))
    again = load_backbone(tmp_path / "model", dtype="float32")
    assert described(again) == described(first)
    ids = {"input_ids": torch.arange(3, 9)[None]}
    ids |= {"decoder_input_ids": ids["input_ids"]} if first.kind == "encoder-decoder" else {}
    assert torch.equal(again.model(**ids)[0], first.model(**ids)[0])


@pytest.mark.parametrize("change", ["weights", "not finite", "damaged", "folder of others", "attention"])
def test_another_model_is_probed_again(change: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_backbone(folder)
    (note,) = (known_layouts.cache_folder() / "layouts").glob("*.json")
    probed: list[str] = []
    probe = known_layouts.probe
    used: list[str] = []

    def watched(model: Any, attention: Any) -> Any:
        probed.append(attention)
        used.append(model.config._attn_implementation)
        return probe(model, attention)

    monkeypatch.setattr(known_layouts, "probe", watched)
    tensors = load_file(folder / "model.safetensors")
    match change:
        case "weights":
            tensors = {name: tensor * 1.1 for name, tensor in tensors.items()}
        case "not finite":
            # The samples of the fingerprint may miss it.
            tensors["model.embed_tokens.weight"][0, 1] = float("nan")
        case "damaged":
            note.write_text(note.read_text().replace("layers.0", "layers.9"))
        case "folder of others":
            note.parent.chmod(0o777)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if change == "not finite":
        with pytest.raises(BackboneError):
            load_backbone(folder)
    else:
        load_backbone(folder, attention="eager" if change == "attention" else "sdpa")
    assert probed == ["eager" if change == "attention" else "sdpa"]
    # The probe compares with the attention of transformers.
    assert used == ["sdpa"]


def test_few_notes_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = known_layouts.cache_folder() / "layouts"
    notes.mkdir(parents=True)
    for number in range(70):
        (notes / f"{number}.json").write_text("{}")
        os.utime(notes / f"{number}.json", (number, number))
    load_backbone(folder)
    assert len(list(notes.glob("*.json"))) == 64
    assert not (notes / "0.json").exists()
