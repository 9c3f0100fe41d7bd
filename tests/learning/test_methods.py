"""The methods that a prefix is compared with: each trains what its name says and nothing else, in the same loop."""

from pathlib import Path

import pytest
import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.lora import add_adapter
from prefixtune.backbone.quiet import quiet_transformers
from prefixtune.data import Example
from prefixtune.errors import BackboneError, ConfigError
from prefixtune.inference.generate import generate
from prefixtune.prefix.fingerprint import fingerprints_match
from prefixtune.training.artifact import load_tuned
from prefixtune.training.config import TrainConfig
from prefixtune.training.train import train
from prefixtune.training.tuning import freeze_tuned, tune
from zoo import store_model

NAMES = ("Ann", "Bo", "Cy", "Di", "Ed", "Flo", "Gus", "Hal")
EIGHT = [Example(f"name : {name}", (f"{name} eats.",)) for name in NAMES]
METHODS = ("full", "adapter", "lora")


@pytest.fixture
def folder(tmp_path):
    """A tiny LLaMA on disk."""
    return Path(store_model(tmp_path / "backbone", "llama"))


@pytest.fixture
def run(tmp_path, folder):
    def start(method, name="run", backbone=None, **changes):
        more = {key: changes.pop(key) for key in ("resume", "on_event") if key in changes}
        settings = {
            "method": method,
            "prefix_length": 4,
            "reparameterization": "none",
            "init_text": "Say it",
            "batch_size": 4,
            "targets_per_source": 2,
            "max_steps": 4,
            "warmup_steps": 0,
            "save_every": 1,
            "dtype": "float32",
            "backbone": str(folder),
            "output": str(tmp_path / name),
            **changes,
        }
        return train(TrainConfig(**settings), backbone=backbone, examples=EIGHT, **more)

    return start


def losses(result):
    return [event["loss"] for event in result.events if event["event"] == "step"]


@pytest.mark.parametrize(
    ("method", "name"), [("adapter", "gpt2"), ("lora", "llama"), ("adapter", "bart"), ("lora", "t5")]
)
def test_inserted_layers_have_no_effect_at_first(method, name, tiny_backbone, random_ids, assert_same):
    backbone = tiny_backbone(name)
    ids = torch.tensor([random_ids(7)])
    more = {"decoder_input_ids": ids.flip(1)} if backbone.kind == "encoder-decoder" else {}
    before = backbone.forward(ids, **more).logits
    tuned = tune(backbone, method, 4)
    assert tuned.adapter_parameters
    assert_same(tuned.forward(ids, **more).logits, before, tolerance=1e-6)


@pytest.mark.parametrize(
    ("method", "dtype"),
    [("full", torch.float32), ("full", torch.bfloat16), ("adapter", torch.bfloat16), ("lora", torch.bfloat16)],
)
def test_a_step_moves_what_is_trained_and_nothing_else(method, dtype, tiny_models, tiny_tokenizer, run):
    backbone = Backbone.from_model(tiny_models("llama").to(dtype), tiny_tokenizer, "tiny")
    before = {name: p.detach().clone() for name, p in backbone.model.named_parameters()}
    # Two steps: in the first, the half of LoRA and of a bottleneck that starts at zero keeps the other half in place.
    run(method, backbone=backbone, max_steps=2, learning_rate=1e-2, dtype="auto")
    moved = set()
    for name, parameter in backbone.model.named_parameters():
        plain = name.replace(".base_layer", "")
        if plain not in before or not torch.equal(parameter.to(dtype), before[plain]):
            moved.add(name)
    trained = set(backbone.adapter_parameters)
    assert moved == trained
    assert all(parameter.dtype == torch.float32 for parameter in backbone.adapter_parameters.values())
    if method == "full":
        assert trained == set(before)
    else:
        assert not trained & set(before)
        assert all(p.dtype == dtype for n, p in backbone.model.named_parameters() if n not in trained)


@pytest.mark.parametrize("method", METHODS)
def test_eight_examples_are_learned_and_the_artifact_knows_them(method, run):
    size, rate = (0, 1e-2) if method == "full" else (16, 2e-2)
    result = run(method, method_size=size, learning_rate=rate, max_steps=100, save_every=100)
    assert losses(result)[-1] < 0.3 * losses(result)[0]
    texts = [example.source for example in EIGHT]
    assert result.prefix is None
    backbone, text_format = load_tuned(result.path)
    outputs = generate(backbone, texts, text_format=text_format, max_new_tokens=12)
    assert sum(output in example.targets for output, example in zip(outputs, EIGHT, strict=True)) >= 7, outputs


@pytest.mark.parametrize("method", ["full", "adapter"])
def test_a_killed_run_resumes_to_the_same_losses(method, run):
    def kill(event):
        if event["event"] == "save" and event["step"] == 2:
            raise RuntimeError

    whole = run(method, "whole")
    with pytest.raises(RuntimeError):
        run(method, "killed", on_event=kill)
    resumed = run(method, "killed", resume=True)
    assert losses(resumed) == losses(whole)
    assert resumed.path.read_bytes() == whole.path.read_bytes()


def test_a_frozen_tuned_backbone_is_in_one_dtype(tiny_models, tiny_tokenizer, random_ids):
    backbone = Backbone.from_model(tiny_models("llama").bfloat16(), tiny_tokenizer, "tiny")
    frozen = freeze_tuned(tune(backbone, "adapter", 4))
    assert {parameter.dtype for parameter in frozen.model.parameters()} == {torch.bfloat16}
    assert not frozen.adapter_parameters
    # A prefix that is trained on it is not for the model as it was loaded.
    assert not fingerprints_match(frozen.fingerprint, backbone.fingerprint)
    assert frozen.forward(torch.tensor([random_ids(5)])).logits.dtype == torch.bfloat16


def test_weights_of_another_backbone_are_refused(run, tmp_path):
    result = run("adapter")
    other = store_model(tmp_path / "other", "llama", seed=5)
    with pytest.raises(BackboneError, match="other weights"):
        load_tuned(result.path, name_or_path=other)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"method": "lorra"}, "method"),
        ({"method": "lora", "quantize": "int8"}, "quantize"),
        ({"method": "lora", "adapter": "folder"}, "adapter"),
        ({"method": "full", "method_size": 7}, "method_size"),
        ({"method_size": 7}, "method_size"),
        ({"method": "full", "init_prefix": "p"}, "init_prefix"),
        ({"method": "lora", "sites": "cross=3"}, "sites"),
        ({"classifier": "head", "label_words": "a=b"}, "label_words"),
    ],
)
def test_contradictions_are_refused(changes, name):
    with pytest.raises(ConfigError, match=name):
        TrainConfig(**changes)


def test_lora_takes_no_other_adapters_place(folder, run):
    backbone = load_backbone(folder)
    with quiet_transformers():
        add_adapter(backbone.model, 2)
    backbone.model.requires_grad_(False)
    with pytest.raises(BackboneError):
        run("lora", backbone=backbone)


def test_a_new_adapter_begins_by_the_seed(folder):
    def begin(seed):
        model = load_backbone(folder).model
        with quiet_transformers():
            add_adapter(model, 2, seed=seed)
        return torch.cat([p.flatten() for p in model.parameters() if p.requires_grad])

    assert torch.equal(begin(1), begin(1))
    assert not torch.equal(begin(0), begin(1))
