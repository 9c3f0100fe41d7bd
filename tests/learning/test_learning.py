"""Training learns, moves what it should and nothing else, and can be stopped anywhere without changing the outcome."""

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch

import prefixtune.prefix.file
import prefixtune.training.loop
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.data import Example
from prefixtune.errors import CheckpointError, ConfigError, TrainingError
from prefixtune.inference.generate import generate
from prefixtune.prefix.prefix import Prefix, content_hash, flatten, save_prefix
from prefixtune.training.checkpoint import load_state, save_state
from prefixtune.training.starts.build import build_encoder
from prefixtune.training.train import train
from short_sentences import EIGHT, HELD_OUT, NAMES, SHARED

MODELS = ("gpt2", "llama", "mistral", "bart", "t5", "m2m_100")
SITES = "encoder=3,decoder=5,cross=2"


@pytest.fixture
def backbone(tiny_backbone):
    return tiny_backbone("llama")


class Killed(Exception):
    """Whatever ends a process."""


def at(kind, step, act):
    """Do something when an event comes."""

    def on_event(event):
        if event["event"] == kind and event["step"] == step:
            act()

    return on_event


def kill():
    raise Killed


def losses(result):
    return [event["loss"] for event in result.events if event["event"] == "step"]


# --- what moves ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "checkpointing"), [("none", True), ("mlp", False)])
@pytest.mark.parametrize("name", MODELS)
def test_one_step_moves_every_trained_tensor_and_no_other(name, kind, checkpointing, tiny_backbone, config_for):
    backbone = tiny_backbone(name)
    before = {key: tensor.clone() for key, tensor in backbone.model.state_dict().items()}
    config = config_for(
        reparameterization=kind,
        initialization="random",
        max_steps=1,
        gradient_checkpointing=checkpointing,
        sites=SITES if backbone.kind == "encoder-decoder" else "",
    )
    start, _ = build_encoder(config, backbone)
    result = train(config, backbone=backbone, examples=SHARED)

    state, _ = load_state(Path(config.output) / "state.safetensors")
    trained = dict(start.named_parameters())
    for key, tensor in trained.items():
        assert not torch.equal(state[f"module.{key}"], tensor), f"{key} has not moved"
    assert result.num_trained == sum(tensor.numel() for tensor in trained.values())
    assert result.prefix.lengths == start.bake().lengths
    for one, other in zip(result.prefix.tensors(), start.bake().tensors(), strict=True):
        assert torch.all((one != other).any(-1)), "every position of every head of every layer must move"

    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert not any(module.training for module in backbone.model.modules())
    for key, tensor in backbone.model.state_dict().items():
        assert torch.equal(tensor, before[key]), f"{key} of the backbone has moved"


# --- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"reparameterization": "scaled", "learning_rate": 0.1, "max_steps": 90}),
        ("bart", {"reparameterization": "mlp", "max_steps": 30}),
        ("t5", {"learning_rate": 1.0, "sites": "encoder"}),
    ],
)
def test_eight_examples_can_be_overfitted(name, changes, tiny_backbone, config_for):
    usual = {"prefix_length": 16, "bottleneck_size": 64, "batch_size": 8, "max_steps": 60, "save_every": 1000}
    config = config_for(initialization="random", **{**usual, "learning_rate": 0.02, **changes})
    result = train(config, backbone=tiny_backbone(name), examples=EIGHT)
    per_token = [event["loss_per_token"] for event in result.events if event["event"] == "step"]
    assert per_token[-1] < 0.3 * per_token[0]


def test_what_was_learned_is_generated(tiny_backbone, config_for):
    backbone, one = tiny_backbone("bart"), [Example("name : Ann", ("Ann eats.",))]
    config = config_for(prefix_length=16, max_steps=60, learning_rate=0.1, save_every=1000, initialization="random")
    result = train(config, backbone=backbone, examples=one)
    prefix = load_prefix(result.path, backbone)
    for beams in (1, 3):
        assert generate(backbone, ["name : Ann"], prefix, max_new_tokens=20, num_beams=beams) == ["Ann eats."]


def test_the_best_prefix_is_kept_and_the_run_stops_early_also_after_stops(backbone, config_for):
    options = {"learning_rate": 0.5, "max_grad_norm": 0.0, "max_steps": 40, "eval_every": 2, "patience": 3}
    data = {"backbone": backbone, "examples": EIGHT[:2], "dev_examples": HELD_OUT}
    whole = train(config_for("whole", **options), **data)
    figures = [event["loss"] for event in whole.events if event["event"] == "evaluation"]
    best = min(range(len(figures)), key=figures.__getitem__)
    step = 2 * (best + 1)
    assert (whole.best_loss, whole.events[-1]["best_step"]) == (figures[best], step)
    assert whole.steps == 2 * len(figures) == step + 2 * 3 < 40
    # Stopped with the best prefix, and after two evaluations without a better one: one more ends the run.
    for moment, resume in (("evaluation", False), ("save", True)):
        with pytest.raises(Killed):
            train(config_for(**options), **data, resume=resume, on_event=at(moment, step + 4 * resume, kill))
        stored = load_prefix(Path(config_for().output) / "prefix.safetensors")
        assert whole.prefix.equal(stored)
        assert stored.header["training"]["steps"] == step
    resumed = train(config_for(**options), **data, resume=True)
    assert (resumed.steps, resumed.best_loss) == (whole.steps, whole.best_loss)
    assert resumed.events[-1]["best_step"] == step
    assert resumed.prefix.equal(whole.prefix)


def test_without_a_development_set_the_last_prefix_is_kept(tiny_backbone, config_for):
    config = config_for(sites="cross=2,encoder=3")
    result = train(config, backbone=tiny_backbone("bart"), examples=EIGHT)
    state, _ = load_state(Path(config.output) / "state.safetensors")
    for site in result.prefix.sites:
        assert torch.equal(flatten(result.prefix.layers[site]), state[f"module.sites.{site}.table"])
    assert math.isnan(result.best_loss)


# --- the same whatever the batching, the same each time --------------------------------------------------------------


@pytest.mark.parametrize(("name", "reduction"), [("llama", "token"), ("bart", "sentence"), ("m2m_100", "sentence")])
def test_accumulation_is_one_large_batch(name, reduction, tiny_backbone, config_for):
    options = {"targets_per_source": 1, "loss_reduction": reduction, "max_steps": 5}
    backbone = tiny_backbone(name)
    large = train(config_for("large", batch_size=6, **options), backbone=backbone, examples=SHARED)
    small = train(
        config_for("small", batch_size=2, gradient_accumulation=3, **options), backbone=backbone, examples=SHARED
    )
    assert losses(small) == pytest.approx(losses(large), rel=1e-6 if name == "llama" else 1e-5)
    assert [e["target_tokens"] for e in small.events if e["event"] == "step"] == [
        e["target_tokens"] for e in large.events if e["event"] == "step"
    ]


def test_a_start_from_a_prefix_goes_on_from_its_head(tiny_backbone, config_for):
    backbone = tiny_backbone("llama")
    options = {"task": "classification", "classifier": "head", "targets_per_source": 1}
    rows = [Example(f"the {word} food", (word[0],)) for word in ("great", "bad", "good", "best")]
    rows = [Example(row.source, ("pos" if row.targets[0] in "g" else "neg",)) for row in rows]
    first = train(config_for("first", **options), backbone=backbone, examples=rows, dev_examples=rows)
    more = {"init_prefix": str(first.path), "initialization": "prefix", "learning_rate": 1e-12, "max_steps": 1}
    second = train(config_for("second", **options, **more), backbone=backbone, examples=rows, dev_examples=rows)
    assert second.best_loss == pytest.approx(first.best_loss, rel=1e-4)
    assert second.prefix.header["initialization"]["head"] == "continued"
    others = [Example(row.source, (row.targets[0].upper(),)) for row in rows]
    third = train(config_for("third", **options, **more), backbone=backbone, examples=others)
    assert third.prefix.header["initialization"]["head"] == "left out"


def test_a_head_trains_with_accumulated_gradients(tiny_backbone, config_for):
    labelled = [Example(f"{name} is here", (("pos", "neg")[index % 2],)) for index, name in enumerate(NAMES)]
    options = {"task": "classification", "classifier": "head", "targets_per_source": 1, "max_steps": 3}
    results = [
        train(
            config_for(f"of {size}", batch_size=size, gradient_accumulation=8 // size, **options),
            backbone=tiny_backbone("bert"),
            examples=labelled,
        )
        for size in (8, 2)
    ]
    assert losses(results[1]) == pytest.approx(losses(results[0]), rel=1e-5)


def test_a_seed_fixes_every_bit(tiny_backbone, config_for):
    options, runs = {"reparameterization": "mlp", "initialization": "random", "max_steps": 3}, []
    for seed in range(2):
        torch.manual_seed(seed)
        runs.append(train(config_for(str(seed), **options), backbone=tiny_backbone("llama"), examples=SHARED))
    assert losses(runs[0]) == losses(runs[1])
    assert runs[0].prefix.equal(runs[1].prefix)


# --- stopping and resuming -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "moments"),
    [("llama", "scaled", (("step", 3), ("save", 4), ("evaluation", 4), ("step", 9))), ("bart", "mlp", (("step", 3),))],
)
def test_resumed_is_uninterrupted(name, kind, moments, tiny_backbone, config_for):
    backbone = tiny_backbone(name)
    options = {
        "reparameterization": kind,
        "initialization": "words" if kind == "scaled" else "random",
        "sites": SITES if backbone.kind == "encoder-decoder" else "",
        "save_every": 2,
        "eval_every": 2,
        "max_steps": 9,
        "gradient_accumulation": 2,
        "weight_decay": 0.01,
    }
    data = {"backbone": backbone, "examples": SHARED, "dev_examples": HELD_OUT}
    whole = train(config_for("whole", **options), **data)

    def log(folder):
        events = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
        kinds = ("start", "step", "evaluation", "end")
        return [{k: v for k, v in event.items() if k != "seconds"} for event in events if event["event"] in kinds]

    for moment, number in moments:
        stopped = config_for(f"stopped-at-{moment}-{number}", **options)
        with pytest.raises(Killed):
            train(stopped, **data, on_event=at(moment, number, kill))
        torch.manual_seed(99)
        resumed = train(stopped, **data, resume=True)
        assert losses(resumed) == losses(whole), (moment, number)
        assert resumed.prefix.equal(whole.prefix), (moment, number)
        assert resumed.best_loss == whole.best_loss
        assert log(resumed.path.parent) == log(whole.path.parent)


def test_a_signal_saves_before_it_stops(backbone, config_for):
    number = signal.SIGTERM
    config = config_for(save_every=100)
    whole = train(config_for("whole", save_every=100), backbone=backbone, examples=SHARED)
    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        train(config, backbone=backbone, examples=SHARED, on_event=at("step", 3, lambda: os.kill(os.getpid(), number)))
    assert signal.getsignal(number) is handler
    _, facts = load_state(Path(config.output) / "state.safetensors")
    assert facts["step"] == 3
    resumed = train(config, backbone=backbone, examples=SHARED, resume=True)
    assert losses(resumed) == losses(whole)
    assert resumed.prefix.equal(whole.prefix)
    # In the last step there is nothing left to stop.
    last = config_for("last", save_every=100)
    kill = at("step", last.max_steps, lambda: os.kill(os.getpid(), number))
    assert train(last, backbone=backbone, examples=SHARED, on_event=kill).prefix.equal(whole.prefix)


def test_a_state_that_lacks_something_is_refused(backbone, config_for):
    train(config_for(), backbone=backbone, examples=SHARED)
    path = Path(config_for().output) / "state.safetensors"
    tensors, facts = load_state(path)
    save_state(path, tensors, {name: fact for name, fact in facts.items() if name != "misses"})
    with pytest.raises(CheckpointError, match="misses"):
        train(config_for(), backbone=backbone, examples=SHARED, resume=True)
    save_state(path, dict(list(tensors.items())[1:]), facts)
    with pytest.raises(CheckpointError, match="does not fit the run"):
        train(config_for(), backbone=backbone, examples=SHARED, resume=True)


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run(backbone, config_for, monkeypatch):
    config = config_for()
    original, calls = prefixtune.training.loop.batch_loss, []

    def poisoned(*arguments):
        calls.append(1)
        return original(*arguments) * (math.nan if len(calls) > 3 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(prefixtune.training.loop, "batch_loss", poisoned)
        with pytest.raises(TrainingError, match=r"loss is nan .* at step 4") as error:
            train(config, backbone=backbone, examples=SHARED)
    assert "learning rate" in error.value.hint
    tensors, facts = load_state(Path(config.output) / "state.safetensors")
    assert facts["step"] == 3
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    # Without the fault, the run resumes as if nothing had happened.
    whole = train(config_for("whole"), backbone=backbone, examples=SHARED)
    assert train(config, backbone=backbone, examples=SHARED, resume=True).prefix.equal(whole.prefix)


# --- where a run starts ----------------------------------------------------------------------------------------------


def test_a_run_from_another_prefix_has_its_length(tiny_backbone, random_prefix, tmp_path, config_for):
    backbone = tiny_backbone("t5")
    layers = random_prefix(backbone, 4).detach().layers
    lengths = {"encoder": 4, "decoder": 2, "cross": 3}
    start = Prefix(
        {site: tuple((k[:, : lengths[site]], v[:, : lengths[site]]) for k, v in layers[site]) for site in layers}
    )
    path = save_prefix(tmp_path / "start.safetensors", start)
    config = config_for(initialization="prefix", init_prefix=str(path), prefix_length=0, reparameterization="none")
    about = {"kind": "prefix", "file": "start.safetensors", "hash": content_hash(start), "lengths": lengths}
    for kind in ("none", "scaled"):
        encoder, found = build_encoder(config.replace(reparameterization=kind), backbone)
        assert encoder.bake().equal(start)
        assert found.description == about
    # Named sites without a length of their own have that of the prefix, too.
    encoder, _ = build_encoder(config.replace(sites="encoder,decoder=2,cross"), backbone)
    assert encoder.bake().equal(start)
    with pytest.raises(ConfigError, match=r"encoder=4,decoder=2,cross=3.*cross=1"):
        build_encoder(config.replace(sites="encoder,decoder,cross=1"), backbone)
    # Without sites a run trains all of the backbone's, as ever.
    save_prefix(path, Prefix({"decoder": start.layers["decoder"]}))
    with pytest.raises(ConfigError, match=r"decoder=2.*encoder=0,decoder=2,cross=0"):
        build_encoder(config, backbone)
    encoder, _ = build_encoder(config.replace(sites="decoder"), backbone)
    assert encoder.bake().sites == ("decoder",)
