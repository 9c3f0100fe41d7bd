"""Exports to ONNX that fail, and the loop over a graph, without any runtime."""

import dataclasses
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest
import torch

from prefixtune.backbone.prefixes import load_prefix
from prefixtune.errors import BackboneError
from prefixtune.interop.onnx import export as target
from prefixtune.prefix.chat_format import allow_template
from prefixtune.prefix.prefix import save_prefix
from prefixtune.prefix.text_format import TextFormat


@pytest.fixture
def runtime(monkeypatch):
    """Stands in for the extra's libraries; the last of them."""
    made = [ModuleType(name) for name in ("onnx", "onnxscript", "onnxruntime")]
    for module in made:
        # torch looks for it, too.
        module.__spec__ = ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return made[-1]


def test_a_model_that_cannot_be_traced(runtime, tiny_backbone, random_prefix, tmp_path, monkeypatch):
    backbone = tiny_backbone("llama")

    def export(*args, **options):
        raise RuntimeError("\nno such operator: aten::strange\nand much more")

    monkeypatch.setattr(torch.onnx, "export", export)
    with pytest.raises(BackboneError, match="tiny-llama"):
        target.export_onnx(random_prefix(backbone, 3), backbone, tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))


def test_a_graph_that_computes_something_else_is_not_kept(runtime, tiny_backbone, random_prefix, tmp_path, monkeypatch):
    backbone = tiny_backbone("llama")
    size = len(backbone.tokenizer)

    class Session:
        def __init__(self, *args, **options):
            pass

        def run(self, names, feed):
            past = [feed[f"past_key_values.{n}.{part}"] for n in range(3) for part in ("key", "value")]
            return [np.zeros((*feed["input_ids"].shape, size), dtype=np.float32), *past]

    monkeypatch.setattr(target, "_trace", lambda backbone, facts, path: path.write_bytes(b"graph"))
    monkeypatch.setattr(runtime, "InferenceSession", Session, raising=False)
    with pytest.raises(BackboneError, match="tiny-llama"):
        target.export_onnx(random_prefix(backbone, 3), backbone, tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))


def test_a_prefix_next_to_an_export_stays(runtime, tiny_backbone, random_prefix, tmp_path, monkeypatch):
    backbone = tiny_backbone("llama")
    form = TextFormat("{source}", "{target}", chat_template="{{ messages[-1].content }}", end="<pad>")
    allow_template(form.chat_template)
    prefix = dataclasses.replace(random_prefix(backbone, 3), header={"text_format": form.to_dict()})
    runtime.__version__ = "1.0"
    monkeypatch.setattr(target, "_trace", lambda backbone, facts, path: path.write_bytes(b"graph"))
    monkeypatch.setattr(target, "_compare", lambda *_: 0.0)
    target.export_onnx(prefix, backbone, tmp_path)
    save_prefix(tmp_path / "prefix.safetensors", prefix)
    facts = target.export_onnx(prefix, backbone, tmp_path)
    assert facts["end_ids"] == [backbone.encode("<pad>")[0], backbone.eos_id]
    assert (tmp_path / "past.safetensors").exists()
    assert load_prefix(tmp_path, backbone).equal(prefix)
