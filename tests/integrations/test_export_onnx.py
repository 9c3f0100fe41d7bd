"""Exported graphs in ONNX Runtime and OpenVINO: logits and tokens are those of `generate`, alone and padded."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file

from examples.to_onnx import generate
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.checkpoint import checkpoint_folder
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate_ids
from prefixtune.interop.onnx import export as target
from prefixtune.prefix.compose import concatenate
from prefixtune.prefix.prefix import save_prefix
from prefixtune.training.starts.words import from_words

# Tracing takes four seconds for each layer; tests/golden traces two of GPT-2's and of LLaMA's.
LAYERS = {"gpt2": {"n_layer": 1}, "llama": {"num_hidden_layers": 1}, "qwen2": {"num_hidden_layers": 1}}

LENGTH, NEW = 6, 10

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:openvino")


class Exported:
    """A backbone, a prefix, and the folder that both were exported to."""

    def __init__(self, backbone, prefix, folder):
        self.backbone, self.prefix, self.folder = backbone, prefix, folder
        self.facts = target.export_onnx(prefix, backbone, folder)
        assert json.loads((folder / "export.json").read_text()) == self.facts
        self.past = load_file(folder / "past.safetensors")
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])

    def run(self, feed):
        return self.session.run(None, feed)


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen2"])
def exported(request, tiny_backbone, random_prefix, tmp_path_factory):
    name = request.param
    backbone = tiny_backbone(name, **LAYERS[name])
    prefix = random_prefix(backbone, LENGTH, seed=1)
    folder = tmp_path_factory.mktemp(request.param)
    if name == "llama":
        parts = [random_prefix(backbone, length, seed=length).detach() for length in (LENGTH - 2, 2)]
        stored = save_prefix(tmp_path_factory.mktemp("joined") / "p.safetensors", concatenate(parts, backbone.rotation))
        prefix = load_prefix(stored, backbone)
    with pytest.MonkeyPatch.context() as patch:
        if name == "qwen2":
            # As for large models: weights in a separate file.
            patch.setattr(target, "MAX_BYTES_IN_GRAPH", 0)
        made = Exported(backbone, prefix, folder)
    assert (folder / "model.onnx.data").exists() == (name == "qwen2")
    return made


@torch.no_grad()
def test_logits_are_the_backbones(exported, random_ids):
    """Of one text, read at once."""
    ids = np.array([random_ids(9, 7)])
    mask, positions = np.ones((1, LENGTH + 9), dtype=np.int64), np.arange(LENGTH, LENGTH + 9)[None]
    feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    found, tokens = torch.from_numpy(exported.run(feed | exported.past)[0]), torch.from_numpy(ids)
    wanted = exported.backbone.forward(tokens, torch.ones_like(tokens), prefixes=exported.prefix).logits
    bare = exported.backbone.forward(tokens, torch.ones_like(tokens)).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert float((wanted - bare).abs().max()) > 0.1


@pytest.mark.deploys("ONNX Runtime", "tokens of two joined prefixes", model="llama")
@pytest.mark.deploys("ONNX Runtime", "tokens, alone and padded; logits to 1e-4", by="exported")
def test_tokens_are_those_of_generate(exported, random_ids):
    prompts = [random_ids(n, seed) for seed, n in enumerate((9, 1, 4, 12, 6))]
    backbone, config = exported.backbone, GenerateConfig(max_new_tokens=NEW)
    expected = generate_ids(backbone, prompts, [exported.prefix] * 5, config=config)
    assert expected != generate_ids(backbone, prompts, [None] * 5, config=config)
    assert generate(exported.run, exported.facts, exported.past, prompts, max_new_tokens=NEW) == expected
    for prompt, output in zip(prompts, expected, strict=True):
        assert generate(exported.run, exported.facts, exported.past, [prompt], max_new_tokens=NEW) == [output]


def test_without_its_past_the_graph_is_the_bare_backbone(exported, random_ids):
    prompts = [random_ids(n, seed) for seed, n in enumerate((9, 1))]
    expected = generate_ids(exported.backbone, prompts, [None] * 2, config=GenerateConfig(max_new_tokens=NEW))
    empty = {name: tensor[:, :, :0] for name, tensor in exported.past.items()}
    assert generate(exported.run, exported.facts, empty, prompts, max_new_tokens=NEW) == expected


@pytest.mark.deploys("OpenVINO", "tokens of the exported graph", by="exported")
def test_openvino_reads_the_graph(exported, random_ids):
    import openvino

    compiled = openvino.Core().compile_model(exported.folder / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    prompts = [random_ids(n, seed) for seed, n in enumerate((9, 1, 4))]
    config = GenerateConfig(max_new_tokens=NEW)
    expected = generate_ids(exported.backbone, prompts, [exported.prefix] * 3, config=config)

    def run(feed):
        return list(compiled(feed).values())

    assert generate(run, exported.facts, exported.past, prompts, max_new_tokens=NEW) == expected


@pytest.mark.deploys("OpenVINO", "tokens, with the prefix as first states", by="exported")
def test_openvino_keeps_the_past_as_states(exported, random_ids):
    """The recipe of docs/export.md: the past moves into the model's states, which begin with the prefix."""
    import openvino
    from openvino._offline_transformations import apply_make_stateful_transformation

    model = openvino.Core().read_model(exported.folder / "model.onnx")
    names = [*exported.past]
    pairs = {name: name.replace("past_key_values", "present") for name in names}
    apply_make_stateful_transformation(model, pairs)
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"})
    request = compiled.create_infer_request()
    prompts = [random_ids(n, seed) for seed, n in enumerate((9, 1, 4))]
    for variable in request.query_state():
        name = next(name for name in names if variable.name.startswith(name))
        variable.state = openvino.Tensor(exported.past[name].repeat(len(prompts), axis=0))

    def run(feed):
        inputs = {name: value for name, value in feed.items() if name not in names}
        # The model keeps the past itself.
        return [request.infer(inputs)["logits"], *(feed[name] for name in names)]

    expected = generate_ids(
        exported.backbone, prompts, [exported.prefix] * 3, config=GenerateConfig(max_new_tokens=NEW)
    )
    assert generate(run, exported.facts, exported.past, prompts, max_new_tokens=NEW) == expected


@pytest.mark.slow
@pytest.mark.deploys(
    "ONNX Runtime", "tokens of the first two layers with their real weights, in float32", model="SmolLM2-135M (llama)"
)
def test_the_embedded_backbone(default_backbone, tmp_path):
    """Its vocabulary and its numbers; a layer takes four seconds to trace."""
    from transformers import AutoModelForCausalLM

    folder = checkpoint_folder("smollm2-135m")
    model = AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=2, dtype=torch.float32)
    backbone = Backbone.from_model(model, default_backbone.tokenizer, "smollm2-135m")
    prefix = from_words(backbone, "Describe the restaurant in one sentence for a guest:", 10)
    made = Exported(backbone, prefix, tmp_path)
    prompts = [backbone.encode(text) for text in ("The Eagle is", "name : Aromi | food : Chinese", "Once")]
    expected = generate_ids(backbone, prompts, [prefix] * 3, config=GenerateConfig(max_new_tokens=16))
    assert expected != generate_ids(backbone, prompts, [None] * 3, config=GenerateConfig(max_new_tokens=16))
    assert generate(made.run, made.facts, made.past, prompts, max_new_tokens=16) == expected
