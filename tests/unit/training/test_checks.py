"""Which runs may share a pass over one backbone, and which options go with a backbone that is loaded, or split."""

import json

import pytest
import torch

import prefixtune as pt
from prefixtune.backbone.backbone import Backbone
from prefixtune.errors import ConfigError
from prefixtune.training.config import TrainConfig
from prefixtune.training.distributed import ProcessGroup
from prefixtune.training.prepare import check_given, check_passes_gradients
from prefixtune.training.together import check_together


class _AskedFor(Exception):
    pass


@pytest.fixture
def folder(tmp_path):
    """A folder that looks like a model, before it is loaded."""
    (tmp_path / "model").mkdir()
    facts = {"model_type": "llama", "num_attention_heads": 2, "hidden_size": 16, "num_hidden_layers": 3}
    (tmp_path / "model" / "config.json").write_text(json.dumps(facts))
    return tmp_path / "model"


@pytest.mark.parametrize("option", [{"adapter": "folder"}, {"shard": True}])
def test_what_runs_cannot_share_is_refused(option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        check_together([TrainConfig(output="a", **option), TrainConfig(output="b")])


def test_weights_without_gradients_are_refused(tiny_backbone, monkeypatch):
    backbone = tiny_backbone("llama")
    check_passes_gradients(backbone)
    weight = backbone.model.lm_head.weight
    kind = type("Int4TilePackedTo4dTensor", (torch.Tensor,), {})
    monkeypatch.setattr(backbone.model, "parameters", lambda: iter([weight, weight.detach().as_subclass(kind)]))
    with pytest.raises(ConfigError):
        check_passes_gradients(backbone)


@pytest.mark.parametrize(
    "option", [{"dtype": "bfloat16"}, {"quantize": "int8"}, {"adapter": "folder"}, {"shard": True}]
)
def test_what_a_loaded_backbone_does_not_follow_is_refused(option, train, tmp_path):
    with pytest.raises(ConfigError, match=next(iter(option))):
        train(**option)
    assert not (tmp_path / "run").exists()


def test_options_that_a_loaded_backbone_has_are_allowed(tiny_models, tiny_tokenizer):
    backbone = Backbone.from_model(tiny_models("llama").bfloat16(), tiny_tokenizer, "tiny", attention="eager")
    check_given(TrainConfig(dtype="bfloat16", device="cpu", attention="eager"), backbone)
    check_given(TrainConfig(), backbone)


def test_a_split_backbone_has_the_dtype_of_the_device_that_computes(folder, examples, tmp_path, monkeypatch):
    asked = {}

    def load(*_, **options):
        asked.update(options)
        raise _AskedFor

    monkeypatch.setattr("prefixtune.training.prepare.load_backbone", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    config = TrainConfig(backbone=str(folder), shard=True, seed=3, output=str(tmp_path / "run"))
    with pytest.raises(_AskedFor):
        pt.train(config, examples=examples, processes=ProcessGroup(0, 2, "cuda:0"))
    assert (asked["dtype"], asked["device"]) == (torch.bfloat16, "cpu")


@pytest.mark.parametrize("method", ["full", "adapter", "lora"])
def test_nothing_is_trained_on_what_another_method_left(method, train, tmp_path):
    size = 0 if method == "full" else 1
    train(1, method=method, method_size=size, output=str(tmp_path / "other"))
    for again in ({}, {"method": method, "method_size": size}):
        with pytest.raises(ConfigError, match="earlier run"):
            train(1, **again)


@pytest.mark.parametrize(
    ("options", "rows", "name"),
    [
        ({"system": "Be short."}, [{"source": "Where?", "target": "Near."}], "system"),
        ({"initialization": "examples"}, [{"text": "the pub is near"}, {"text": "far"}], "initialization"),
        ({"init_prefix": "FILE", "prefix_length": 4}, [{"prompt": "a", "completion": "b"}], "prefix_length"),
        ({"init_prefix": "FILE", "sites": "cross=3"}, [{"prompt": "a", "completion": "b"}], "cross"),
        ({"classifier": "head", "method": "lora"}, [{"text": "a", "label": "b"}, {"text": "c", "label": "d"}], "lora"),
        ({"patience": 3}, [{"prompt": "a", "completion": "b"}], "patience"),
        ({"shard": True}, [{"prompt": "a", "completion": "b"}], "shard"),
    ],
)
def test_what_does_not_go_together_is_refused_and_leaves_nothing(backbone, tmp_path, options, rows, name):
    start = tmp_path / "start.safetensors"
    pt.save_prefix(start, pt.Prefix({"decoder": ((torch.zeros(2, 3, 8), torch.zeros(2, 3, 8)),) * 3}))
    options = {key: str(start) if value == "FILE" else value for key, value in options.items()}
    with pytest.raises(pt.PrefixError, match=name):
        pt.train(TrainConfig(output=str(tmp_path / "run"), **options), backbone=backbone, examples=rows)
    assert not (tmp_path / "run" / "state.safetensors").exists()
