"""PEFT's files without PEFT: there and back bit for bit, and every refusal."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.prefixes import load_prefix, make_header
from prefixtune.errors import BackboneError, CheckpointError, ConfigError, PrefixError
from prefixtune.interop.peft import export_peft, import_peft
from prefixtune.prefix.prefix import Head, Prefix, save_prefix
from zoo import make_model

P = 4


@pytest.fixture
def prefix(llama, random_prefix):
    return Prefix(
        random_prefix(llama, P).detach().layers, make_header(llama, task="toy", text_format={"prompt": "x {source}"})
    )


@pytest.fixture
def folder(prefix, tmp_path):
    return export_peft(prefix, tmp_path / "adapter")


def facts_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def change(folder, **changes):
    (folder / "adapter_config.json").write_text(json.dumps({**facts_of(folder), **changes}))
    return folder


def rewrite(folder, tensors):
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_prefix_comes_back_bit_for_bit(prefix, llama, dtype, tmp_path):
    exported = prefix.to(dtype)
    imported = import_peft(export_peft(exported, tmp_path / "adapter", llama), llama)
    assert imported.equal(exported)
    # Also what the file says of it.
    assert {name: imported.header[name] for name in prefix.header} == prefix.header


def test_what_peft_trained_becomes_our_file(folder, prefix, llama, tmp_path):
    rows = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    rewrite(folder, {"prompt_embeddings": rows})
    made = import_peft(folder, llama)
    assert made.equal(prefix)
    # PEFT puts nothing around a text.
    assert made.header["text_format"] == {"prompt": "{source}", "target": "{target}"}
    stored = load_prefix(save_prefix(tmp_path / "p.safetensors", made), llama)
    assert stored.equal(prefix)
    assert stored.header["backbone"] == make_header(llama)["backbone"]
    alone = import_peft(folder).header["backbone"]
    assert alone == {"name": "tiny-llama", "kind": "decoder"}


def test_a_cartridge_keeps_its_frozen_positions(prefix, tmp_path):
    first = export_peft(prefix, tmp_path / "a", peft_type="CARTRIDGE", num_frozen_tokens=2)
    assert (facts_of(first)["peft_type"], facts_of(first)["num_frozen_tokens"]) == ("CARTRIDGE", 2)
    stored = load_prefix(save_prefix(tmp_path / "p.safetensors", import_peft(first)))
    second = facts_of(export_peft(stored, tmp_path / "b"))
    assert (second["peft_type"], second["num_frozen_tokens"]) == ("CARTRIDGE", 2)
    assert import_peft(tmp_path / "b").equal(prefix)
    assert facts_of(export_peft(prefix, tmp_path / "c", peft_type="CARTRIDGE"))["num_frozen_tokens"] == 1
    shorter = Prefix(
        {"decoder": tuple((key[:, :1], value[:, :1]) for key, value in stored.layers["decoder"])}, stored.header
    )
    assert facts_of(export_peft(shorter, tmp_path / "d"))["num_frozen_tokens"] == 1


# --- what PEFT cannot hold -------------------------------------------------------------------------------------------


def test_prefixes_that_peft_cannot_hold(prefix, tiny_backbone, random_prefix, tmp_path):
    bart = tiny_backbone("bart")
    three = Prefix(random_prefix(bart, 2).detach().layers, make_header(bart))
    (key, value), *others = prefix.layers["decoder"]
    for made, options in (
        (three, {}),
        (Prefix({"decoder": three.layers["decoder"]}, make_header(bart)), {}),
        (Prefix(prefix.layers, head=Head(torch.zeros(2, 32), torch.zeros(2))), {}),
        (Prefix(prefix.layers, {"adapter": "adapter"}), {}),
        (Prefix({"decoder": ((key[:1], value[:1]), *others)}), {}),
        (Prefix({"decoder": ((key, value[..., :4]),)}), {}),
        (Prefix({"decoder": ((key / 0, value), *others)}), {}),
        (prefix, {"peft_type": "PREFIX_TUNNING"}),
        (prefix, {"num_frozen_tokens": 1}),
        (prefix, {"peft_type": "CARTRIDGE", "num_frozen_tokens": 5}),
        (prefix, {"backbone": tiny_backbone("gpt2")}),
        (prefix, {"backbone": tiny_backbone("llama", seed=1)}),
    ):
        with pytest.raises(PrefixError):
            export_peft(made, tmp_path / "adapter", **options)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("name", ["lfm2", "gemma3n_text"])
def test_models_in_which_peft_would_miss_the_layers(name, random_prefix, tiny_tokenizer, tmp_path):
    backbone = Backbone.from_model(make_model(name, tiny_tokenizer), tiny_tokenizer, name)
    made = random_prefix(backbone, P).detach()
    with pytest.raises(BackboneError):
        export_peft(made, tmp_path / "adapter", backbone)
    with pytest.raises(BackboneError):
        import_peft(export_peft(made, tmp_path / "adapter"), backbone)


# --- adapters that are refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "LORA"},
        {"task_type": "SEQ_2_SEQ_LM"},
        {"num_transformer_submodules": 2},
        {"num_virtual_tokens": 5},
        {"num_attention_heads": 3},
        {"num_layers": 0},
        {"peft_type": "CARTRIDGE", "num_frozen_tokens": 5},
    ],
)
def test_configurations_that_are_refused(folder, changes):
    with pytest.raises(CheckpointError):
        import_peft(change(folder, **changes))


def test_tensors_that_are_refused(folder, tiny_backbone):
    for other in (tiny_backbone("gpt2"), tiny_backbone("llama", seed=1), tiny_backbone("bart")):
        with pytest.raises(BackboneError):
            import_peft(folder, other)
    rows = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    for tensors in (
        {"prompt_embeddings": rows.clone().fill_(torch.nan)},
        {"prompt_embeddings": rows.clone().fill_(torch.inf)},
        {"prompt_embeddings": rows.long()},
        {"prompt_embeddings": rows, "score.weight": rows.clone()},
        {"lora_A": rows},
    ):
        with pytest.raises(CheckpointError):
            import_peft(rewrite(folder, tensors))
    (folder / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError):
        import_peft(folder)


def test_folders_that_are_refused(folder, tmp_path):
    with pytest.raises(CheckpointError):
        import_peft(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        import_peft(folder)
    for text in ("{", "[]"):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(CheckpointError):
            import_peft(folder)


def test_nothing_of_another_kind_is_written_over(folder, prefix, tmp_path):
    export_peft(prefix, folder)  # An earlier one is replaced.
    lora = change(folder, peft_type="LORA")
    before = {path.name: path.read_bytes() for path in lora.iterdir()}
    with pytest.raises(ConfigError):
        export_peft(prefix, lora)
    assert {path.name: path.read_bytes() for path in lora.iterdir()} == before
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ConfigError):
        export_peft(prefix, tmp_path / "model")


def test_a_pickle_is_refused(folder):
    stored, pickle = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    torch.save(load_file(stored), pickle)
    stored.unlink()
    with pytest.raises(CheckpointError) as error:
        import_peft(folder)
    assert "safe_serialization" in error.value.hint
    # Whatever its name is.
    pickle.replace(stored)
    with pytest.raises(CheckpointError):
        import_peft(folder)
