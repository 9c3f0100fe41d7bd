"""Several prefixes trained at once: each as if it were trained alone, whatever the others are."""

import json
from pathlib import Path

import pytest
import torch

import prefixtune.training.loop
import prefixtune.training.together
from oracles import losses_and_gradients
from patching import replace_everywhere
from prefixtune.backbone.loss import batch_loss
from prefixtune.cli.main import main
from prefixtune.data import Example
from prefixtune.data.batching import collate, join
from prefixtune.data.encoding import TokenizedExample
from prefixtune.errors import ConfigError, TrainingError
from prefixtune.training.config import TrainConfig
from prefixtune.training.loop import forward_backward
from prefixtune.training.train import train, train_together
from zoo import store_model

NAMES = ("Ann", "Bo", "Cy", "Di", "Ed", "Flo")
EATS = [Example(f"name : {name}", (f"{name} eats.", f"Eat, {name}!")) for name in NAMES]
GOES = [Example(f"who : {name} | where : home", (f"{name} goes home.",)) for name in NAMES[:3]]
HELD_OUT = [Example("name : Zed", ("Zed eats.",))]


@pytest.fixture
def run_defaults():
    return {"init_text": "Say it", "save_every": 2, "targets_per_source": TrainConfig().targets_per_source}


def runs_of(make, where):
    """Other lengths, rates, seeds, steps, reparameterizations and accumulations."""
    return [
        make(f"{where}/a"),
        make(f"{where}/b", prefix_length=7, learning_rate=3e-3, seed=1, max_steps=9),
        make(f"{where}/c", prefix_length=2, reparameterization="mlp", batch_size=2, gradient_accumulation=2),
        make(f"{where}/d", initialization="random", seed=2, max_steps=3, loss_reduction="token"),
    ]


DATA = [EATS, GOES, EATS[::-1], GOES]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "bart", "t5", "gpt_oss"])
def test_gradients_equal_those_of_separate_runs(family, tiny_backbone, random_prefix, random_ids, assert_same):
    backbone = tiny_backbone(family)
    lengths = [3, 6, 1]
    if backbone.kind == "encoder-decoder":
        lengths = [{"encoder": 3, "decoder": 2, "cross": 4}, {"decoder": 5}, {"encoder": 1, "cross": 2}]
    prefixes = [random_prefix(backbone, length, seed) for seed, length in enumerate(lengths)]

    def example(count, seed):
        return TokenizedExample(
            tuple(random_ids(count, seed + 10)), (tuple(random_ids(4, 1)), tuple(random_ids(3, seed)))
        )

    batches = [collate(backbone, [example(count, seed) for count in (5, 2 + seed)]) for seed in range(3)]
    alone = [losses_and_gradients(backbone, *one, [one[0]]) for one in zip(prefixes, batches, strict=True)]
    losses = batch_loss(backbone, prefixes, join(batches))
    assert_same(losses, torch.cat([own for own, *_ in alone]))
    gradients = torch.autograd.grad(
        losses.square().sum(), [tensor for prefix in prefixes for tensor in prefix.tensors()]
    )
    assert_same(gradients, [gradient for _, *own in alone for gradient in own])


def test_runs_trained_together_equal_separate_runs(tiny_backbone, config_for):
    backbone = tiny_backbone("bart")
    before = {name: parameter.clone() for name, parameter in backbone.model.named_parameters()}
    dev = [HELD_OUT, None, HELD_OUT, None]
    alone = [
        train(config, backbone=backbone, examples=data, dev_examples=held)
        for config, data, held in zip(runs_of(config_for, "alone"), DATA, dev, strict=True)
    ]
    events = []
    configs = runs_of(config_for, "together")
    together = train_together(configs, backbone=backbone, examples=DATA, dev_examples=dev, on_event=events.append)
    for one, other, config in zip(alone, together, configs, strict=True):
        assert one.steps == other.steps == config.max_steps
        losses = [[event["loss"] for event in result.events if event["event"] == "step"] for result in (one, other)]
        assert losses[1] == pytest.approx(losses[0], rel=2e-5)
        assert one.prefix is not None
        assert other.prefix is not None
        for mine, theirs in zip(one.prefix.tensors(), other.prefix.tensors(), strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4)
        assert other.prefix.header["training"]["seed"] == config.seed
        of_run = [event for event in events if event["run"] == config.output]
        assert [{k: v for k, v in event.items() if k != "run"} for event in of_run] == list(other.events)
        logged = (Path(config.output) / "events.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in logged] == list(other.events)
    assert all(torch.equal(before[name], p) for name, p in backbone.model.named_parameters())


def test_a_run_whose_loss_is_not_finite_leaves_the_others(tiny_backbone, config_for, monkeypatch):
    backbone, good = tiny_backbone("llama"), config_for("good")
    own = prefixtune.training.loop.forward_backward

    def spoil(backbone, steps):
        own(backbone, steps)
        if len(steps) == 2 and spoil.steps == 3:
            steps[1].losses = [torch.tensor(float("nan"))]
        spoil.steps += 1

    spoil.steps = 0
    replace_everywhere(monkeypatch, forward_backward, spoil)
    with pytest.raises(TrainingError, match="step 4"):
        train_together([good, config_for("bad", seed=1)], backbone=backbone, examples=[EATS, GOES])
    monkeypatch.undo()
    alone = train(config_for("alone"), backbone=backbone, examples=EATS)
    ended = (Path(good.output) / "events.jsonl").read_text().splitlines()[-1]
    assert json.loads(ended)["event"] == "end"
    assert (Path(good.output) / "prefix.safetensors").exists()
    # What the bad one had saved is there to look at.
    resumed = train(config_for("bad", seed=1), backbone=backbone, examples=GOES, resume=True)
    assert resumed.steps == alone.steps


def test_stopped_runs_resume_to_the_same_end(tiny_backbone, config_for, monkeypatch):
    backbone = tiny_backbone("llama")
    whole = train_together(runs_of(config_for, "whole"), backbone=backbone, examples=DATA)
    own = prefixtune.training.loop.forward_backward
    count = 0

    def kill(backbone, steps):
        nonlocal count
        count += 1
        if count == 5:
            raise MemoryError
        own(backbone, steps)

    with monkeypatch.context() as patch:
        replace_everywhere(patch, forward_backward, kill)
        with pytest.raises(MemoryError):
            train_together(runs_of(config_for, "cut"), backbone=backbone, examples=DATA)
    again = train_together(runs_of(config_for, "cut"), backbone=backbone, examples=DATA, resume=True)
    for one, other in zip(whole, again, strict=True):
        assert one.prefix is not None
        assert other.prefix is not None
        assert one.steps == other.steps
        for mine, theirs in zip(one.prefix.tensors(), other.prefix.tensors(), strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_finished_prefix_without_its_state_stays(tiny_backbone, config_for):
    backbone = tiny_backbone("llama")
    configs = [config_for("done", max_steps=1)]
    (done,) = train_together(configs, backbone=backbone, examples=[EATS])
    stored = done.path.read_bytes()
    (done.path.parent / "state.safetensors").unlink()
    with pytest.raises(ConfigError, match="done' already holds a run") as caught:
        train_together([*configs, config_for("new", max_steps=1)], backbone=backbone, examples=DATA[:2], resume=True)
    assert "--resume" not in str(caught.value.hint)
    assert done.path.read_bytes() == stored


def test_what_cannot_share_a_pass_is_refused(tiny_backbone, config_for, tmp_path):
    backbone = tiny_backbone("llama")
    with pytest.raises(ConfigError, match="no run"):
        train_together([], backbone=backbone)
    wrong = [config_for("a"), config_for("a"), config_for("b", method="lora"), config_for("c", dtype="bfloat16")]
    with pytest.raises(ConfigError, match=r"dtype.*several runs would write.*'lora'") as caught:
        train_together(wrong, backbone=backbone)
    assert caught.value.hint
    with pytest.raises(ConfigError, match="reads no packed rows"):
        train_together([config_for("a")], backbone=tiny_backbone("m2m_100"), examples=[EATS])
    assert not list(tmp_path.iterdir())


def test_the_command_trains_files_together(tmp_path, capsys):
    folder = store_model(tmp_path / "tiny", "llama")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"source": e.source, "target": e.targets[0]}) + "\n" for e in EATS))
    for name, length in (("one", 3), ("two", 5)):
        (tmp_path / f"{name}.toml").write_text(
            f'backbone = "{folder}"\ntrain = "{data}"\noutput = "{tmp_path / name}"\nprefix_length = {length}\n'
            'source = "source"\ntarget = "target"\ndtype = "float32"\n'
            'init_text = "Say it"\nreparameterization = "none"\n'
        )
    files = [str(tmp_path / f"{name}.toml") for name in ("one", "two")]
    assert main(["train", "--together", *files, "--max-steps", "3", "--batch-size", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [str(tmp_path / n / "prefix.safetensors") for n in ("one", "two")]
    assert main(["train", "--together", *files, "--output", "x"]) == 2
    assert "--output" in capsys.readouterr().err
