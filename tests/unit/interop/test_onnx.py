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
from prefixtune.interop.onnx.run import generate, past_names
from prefixtune.prefix.chat_format import allow_template
from prefixtune.prefix.prefix import save_prefix
from prefixtune.prefix.text_format import TextFormat

FACTS = {"num_layers": 1, "num_kv_heads": 2, "head_dim": 3, "pad_id": 0, "end_ids": [9]}

PREFIX = {name: np.ones((1, 2, 4, 3), dtype=np.float32) for name in past_names(FACTS)}


class Graph:
    """Records its inputs; its logits say that the token after t is t + 1."""

    def __init__(self):
        self.fed = []

    def __call__(self, feed):
        self.fed.append(feed)
        ids = feed["input_ids"]
        grown = [np.pad(feed[name], ((0, 0), (0, 0), (0, ids.shape[1]), (0, 0))) for name in past_names(FACTS)]
        return [np.eye(12, dtype=np.float32)[ids + 1], *grown]


def test_masks_positions_and_past_of_a_padded_batch():
    graph = Graph()
    assert generate(graph, FACTS, PREFIX, [[1, 2, 6], [4]], max_new_tokens=3) == [[7, 8], [5, 6, 7]]
    first, second, third = graph.fed
    assert first["input_ids"].tolist() == [[1, 2, 6], [0, 0, 4]]
    assert first["attention_mask"].tolist() == [[1] * 7, [1, 1, 1, 1, 0, 0, 1]]
    assert first["position_ids"].tolist() == [[4, 5, 6], [4, 4, 4]]
    assert first["past_key_values.0.key"].shape == (2, 2, 4, 3)
    assert second["input_ids"].tolist() == [[7], [5]]
    assert second["position_ids"].tolist() == [[7], [5]]
    assert third["attention_mask"].tolist() == [[1] * 9, [1, 1, 1, 1, 0, 0, 1, 1, 1]]
    assert third["past_key_values.0.value"].shape == (2, 2, 8, 3)


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
