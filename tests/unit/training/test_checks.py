"""Which runs may share a pass over one backbone, and which options go with a backbone that is loaded, or split."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import prefixtune as pt
from prefixtune.backbone.backbone import Backbone
from prefixtune.errors import ConfigError
from prefixtune.training.config import TrainConfig
from prefixtune.training.distributed import ProcessGroup
from prefixtune.training.prepare import check_passes_gradients
from prefixtune.training.together import check_together


class _AskedFor(Exception):
    pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that looks like a model, before it is loaded."""
    (tmp_path / "model").mkdir()
    facts = {"model_type": "llama", "num_attention_heads": 2, "hidden_size": 16, "num_hidden_layers": 3}
    (tmp_path / "model" / "config.json").write_text(json.dumps(facts))
    return tmp_path / "model"


@pytest.mark.parametrize("values", [{"adapter": "folder"}, {"shard": True}], ids=str)
def test_what_runs_cannot_share_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        check_together([TrainConfig(output="a", **values), TrainConfig(output="b")])


def test_weights_without_gradients_are_refused(tiny_backbone: Callable[..., Any], monkeypatch: Any) -> None:
    backbone = tiny_backbone("llama")
    check_passes_gradients(backbone)
    weight = backbone.model.lm_head.weight
    kind = type("Int4TilePackedTo4dTensor", (torch.Tensor,), {})
    monkeypatch.setattr(backbone.model, "parameters", lambda: iter([weight, weight.detach().as_subclass(kind)]))
    with pytest.raises(ConfigError):
        check_passes_gradients(backbone)


def test_what_a_loaded_backbone_does_not_follow_is_refused(train: Callable[..., Any], tmp_path: Path) -> None:
    for name, value in {"dtype": "bfloat16", "attention": "eager", "quantize": "int8", "adapter": "folder"}.items():
        with pytest.raises(ConfigError, match=name):
            train(**{name: value})
    assert not (tmp_path / "run").exists()


def test_a_split_backbone_has_the_dtype_of_the_device_that_computes(
    folder: Path, examples: list[pt.Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def load(*_: Any, **options: Any) -> Any:
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


def test_nothing_is_trained_on_what_another_method_left(train: Callable[..., Any], tmp_path: Path) -> None:
    train(1, method="adapter", method_size=1, output=str(tmp_path / "other"))
    for again in ({}, {"method": "adapter", "method_size": 1}):
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
def test_what_does_not_go_together_is_refused_and_leaves_nothing(
    backbone: Backbone, tmp_path: Path, options: dict[str, Any], rows: list[Any], name: str
) -> None:
    start = tmp_path / "start.safetensors"
    pt.save_prefix(start, pt.Prefix({"decoder": ((torch.zeros(2, 3, 8), torch.zeros(2, 3, 8)),) * 3}))
    options = {key: str(start) if value == "FILE" else value for key, value in options.items()}
    with pytest.raises(pt.PrefixError, match=name):
        pt.train(TrainConfig(output=str(tmp_path / "run"), **options), backbone=backbone, examples=rows)
    assert not (tmp_path / "run" / "state.safetensors").exists()
