"""A GGUF file is a backbone: its weights, tokenizer and template, de-quantized once."""

import json

import gguf
import pytest
import torch
from gguf.quants import dequantize, quantize
from transformers import AutoModelForCausalLM

from prefixtune.backbone import devices
from prefixtune.backbone.convert import gguf_folder, read_gguf
from prefixtune.backbone.load import load_backbone, load_tokenizer
from prefixtune.backbone.prefixes import load_prefix, make_header
from prefixtune.backbone.shapes import load_shapes
from prefixtune.data.chat import has_chat_template
from prefixtune.engine.gguf import find_gguf
from prefixtune.errors import BackboneError
from prefixtune.prefix.prefix import Prefix, save_prefix
from random_prefixes import random_prefix

TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}{% endfor %}"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFIXTUNE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def write(tiny_models, tiny_tokenizer, tmp_path):
    """Write a tiny model as llama.cpp's converter would; its matrices, but for narrow ones, in this quantization."""

    def write(kind="qwen2", quantization="Q8_0", template=TEMPLATE, architecture=None, extra=lambda writer: None):
        model, path = tiny_models(kind, hidden_size=256, intermediate_size=256), tmp_path / f"{kind}.gguf"
        config, known = model.config, {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        names = gguf.get_tensor_name_map(known[kind], config.num_hidden_layers)
        writer = gguf.GGUFWriter(path, architecture or kind)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(12345.0)
        writer.add_vocab_size(len(tiny_tokenizer))
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        tokens = tiny_tokenizer.convert_ids_to_tokens(list(range(len(tiny_tokenizer))))
        # In place of a character that no text here has: what the one merge makes.
        tokens[tokens.index("~")] = "!!"
        writer.add_token_list(tokens)
        special = set(tiny_tokenizer.all_special_ids)
        writer.add_token_types([3 if number in special else 1 for number in range(len(tiny_tokenizer))])
        writer.add_token_merges(["! !"])
        writer.add_bos_token_id(tiny_tokenizer.bos_token_id)
        writer.add_eos_token_id(tiny_tokenizer.eos_token_id)
        writer.add_file_type(gguf.LlamaFileType[("ALL_" if quantization == "F32" else "MOSTLY_") + quantization])
        if template:
            writer.add_chat_template(template)
        extra(writer)
        for name, tensor in model.state_dict().items():
            numbers = tensor.float()
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            if kind == "llama" and (count := next((n for key, n in heads.items() if key in name), 0)):
                numbers = numbers.view(count, 2, -1, numbers.shape[-1]).transpose(1, 2).reshape(numbers.shape)
            own = gguf.GGMLQuantizationType[quantization if numbers.ndim > 1 else "F32"]
            data = quantize(numbers.contiguous().numpy(), own)
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), data, raw_dtype=own)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path, model

    return write


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("quantization", ["F32", "Q8_0"])
def test_the_weights_are_those_of_the_file(write, kind, quantization):
    path, model = write(kind, quantization)
    backbone = load_backbone(str(path), dtype="bfloat16", device="cpu", self_check=False)
    found, wanted = backbone.model.state_dict(), model.state_dict()
    assert found.keys() == wanted.keys()
    assert not backbone.unused_weights
    for name, weight in found.items():
        assert weight.dtype == torch.bfloat16
        exact = wanted[name].float()
        if quantization == "F32":
            assert torch.equal(weight, exact.bfloat16()), name
        assert (weight.float() - exact).abs().max() <= exact.abs().max() / 100, name
    assert backbone.model.config.rope_parameters["rope_theta"] == 12345.0
    vectors = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in read_gguf(path).tensors}
    exact = torch.tensor(vectors["blk.0.attn_v.weight"]).bfloat16()
    assert torch.equal(found["model.layers.0.self_attn.v_proj.weight"], exact)
    # transformers' own reading, which takes more memory.
    other = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).state_dict()
    assert all(torch.equal(weight, other[name].bfloat16()) for name, weight in found.items())


def test_every_command_has_its_tokenizer_and_shapes(write, tmp_path):
    path, _ = write()
    backbone = load_backbone(str(path), device="cpu", self_check=False)
    shapes, reader = load_shapes(str(path)), load_tokenizer(str(path))
    assert shapes.fingerprint == backbone.fingerprint
    assert shapes.geometry == backbone.geometry
    assert backbone.tokenizer.chat_template == reader.tokenizer.chat_template == TEMPLATE
    assert backbone.tokenizer("e\u0301").input_ids == reader.tokenizer("\u00e9").input_ids
    assert backbone.tokenizer("<s>").input_ids[-1] == backbone.tokenizer.bos_token_id
    assert find_gguf("", shapes) == (path, "Q8_0")
    prefix = Prefix(random_prefix(backbone, 3).detach().layers, make_header(backbone))
    save_prefix(tmp_path / "prefix.safetensors", prefix)
    for one in (backbone, shapes):
        assert load_prefix(tmp_path / "prefix.safetensors", one).length() == 3


def test_it_is_converted_once_and_again_when_it_changes(write, home):
    path, _ = write()
    folder = gguf_folder(path)
    began = (folder / "config.json").stat().st_mtime_ns
    assert gguf_folder(path) == folder
    assert (folder / "config.json").stat().st_mtime_ns == began
    write(quantization="F32")
    changed = gguf_folder(path)
    assert [one for one in (home / "gguf").iterdir() if one.is_dir()] == [changed] != [folder]
    index = json.loads((changed / "model.safetensors.index.json").read_text())
    assert all((changed / file).is_file() for file in index["weight_map"].values())


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.2, 0.5, 0.999])
@pytest.mark.parametrize("load", [load_backbone, load_shapes, load_tokenizer])
def test_a_cut_file_is_refused(write, home, load, share):
    path, _ = write()
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(BackboneError):
        load(str(path))
    assert not [one for one in (home / "gguf").glob("*") if one.is_dir()]


@pytest.mark.parametrize("load", [load_backbone, load_shapes, load_tokenizer])
def test_an_unknown_architecture_is_refused(write, load):
    with pytest.raises(BackboneError):
        load(str(write(architecture="other")[0]))


def test_scaled_positions_are_refused(write):
    path, _ = write(extra=lambda writer: writer.add_tensor("rope_freqs.weight", torch.ones(8).numpy()))
    with pytest.raises(BackboneError):
        load_backbone(str(path))


def test_a_file_without_a_chat_template_has_none(write):
    backbone = load_backbone(str(write(template="")[0]), device="cpu", self_check=False)
    assert not has_chat_template(backbone)


def test_a_model_larger_than_memory_is_refused_before_it_is_read(write, save_model, tmp_path, home, monkeypatch):
    path, folder = write()[0], save_model(tmp_path / "llama")
    monkeypatch.setattr(devices, "free_memory", lambda device: 10_000)
    with pytest.raises(BackboneError):
        load_backbone(str(path), device="cpu")
    assert not [one for one in (home / "gguf").glob("*") if one.is_dir()]
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    with pytest.raises(BackboneError) as caught:
        load_backbone(str(folder), device="cpu")
    assert "0.00 GiB" in str(caught.value)
    # llama.cpp needs less.
    assert load_shapes(str(path)).kind == "decoder"
