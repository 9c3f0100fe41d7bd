"""An encoder-decoder learns through its prefix alone; nothing else moves; a stopped run goes on as if it had not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixtune.backbone.prefixes import load_prefix
from prefixtune.data import Example
from prefixtune.errors import DataError
from prefixtune.inference.generate import generate
from prefixtune.prefix.prefix import flatten
from prefixtune.training.checkpoint import load_state
from prefixtune.training.config import TrainConfig
from prefixtune.training.starts.build import build_encoder
from prefixtune.training.train import TrainResult, train
from short_sentences import EIGHT, HELD_OUT, SHARED


@pytest.fixture
def run_defaults() -> dict[str, Any]:
    return {"initialization": "random"}


def losses(result: TrainResult) -> list[float]:
    return [event["loss"] for event in result.events if event["event"] == "step"]


@pytest.mark.parametrize(("kind", "checkpointing"), [("none", True), ("mlp", False)])
@pytest.mark.parametrize("name", ["bart", "pegasus", "t5", "m2m_100"])
def test_one_step_moves_every_trained_tensor_and_no_other(
    name: str, kind: str, checkpointing: bool, tiny_backbone: Any, config_for: Callable[..., TrainConfig]
):
    backbone = tiny_backbone(name)
    before = {key: tensor.clone() for key, tensor in backbone.model.state_dict().items()}
    config = config_for(
        reparameterization=kind,
        sites="encoder=3,decoder=5,cross=2",
        max_steps=1,
        gradient_checkpointing=checkpointing,
    )
    start, _ = build_encoder(config, backbone)
    result = train(config, backbone=backbone, examples=SHARED)

    state, _ = load_state(Path(config.output) / "state.safetensors")
    trained = dict(start.named_parameters())
    for key, tensor in trained.items():
        assert not torch.equal(state[f"module.{key}"], tensor), f"{key} has not moved"
    assert result.num_trained == sum(tensor.numel() for tensor in trained.values())
    assert {site: result.prefix.length(site) for site in result.prefix.sites} == {
        "encoder": 3,
        "decoder": 5,
        "cross": 2,
    }
    baked = start.bake()
    for site, layers in result.prefix.layers.items():
        for pair, first in zip(layers, baked.layers[site], strict=True):
            for one, other in zip(pair, first, strict=True):
                assert torch.all((one != other).any(-1)), "every position of every head of every layer must move"

    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert not any(module.training for module in backbone.model.modules())
    for key, tensor in backbone.model.state_dict().items():
        assert torch.equal(tensor, before[key]), f"{key} of the backbone has moved"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("bart", {"learning_rate": 0.2}),
        ("bart", {"learning_rate": 0.02, "reparameterization": "mlp"}),
        ("t5", {"learning_rate": 0.2}),
        ("t5", {"learning_rate": 1.0, "sites": "encoder"}),
    ],
)
def test_eight_examples_can_be_overfitted(
    name: str, changes: dict[str, Any], tiny_backbone: Any, config_for: Callable[..., TrainConfig]
):
    config = config_for(prefix_length=16, bottleneck_size=64, batch_size=8, max_steps=60, save_every=1000, **changes)
    result = train(config, backbone=tiny_backbone(name), examples=EIGHT)
    per_token = [event["loss_per_token"] for event in result.events if event["event"] == "step"]
    assert per_token[-1] < 0.3 * per_token[0]


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_what_was_learned_is_generated(name: str, tiny_backbone: Any, config_for: Callable[..., TrainConfig]):
    backbone, one = tiny_backbone(name), [Example("name : Ann", ("Ann eats.",))]
    config = config_for(prefix_length=16, max_steps=60, learning_rate=0.1, save_every=1000)
    result = train(config, backbone=backbone, examples=one)
    prefix = load_prefix(result.path, backbone)
    for beams in (1, 3):
        assert generate(backbone, ["name : Ann"], prefix, max_new_tokens=20, num_beams=beams) == ["Ann eats."]


class Killed(Exception):
    """Stands for whatever ends a process."""


@pytest.mark.parametrize("kind", ["none", "mlp", "scaled"])
@pytest.mark.parametrize(("name", "moment"), [("bart", ("step", 3)), ("t5", ("evaluation", 4))])
def test_resumed_is_uninterrupted(
    name: str, moment: tuple[str, int], kind: str, tiny_backbone: Any, config_for: Callable[..., TrainConfig]
):
    options = {
        "reparameterization": kind,
        "initialization": "words" if kind == "scaled" else "random",
        "init_text": "Say it",
        "sites": "cross=2,encoder=3,decoder",
        "save_every": 2,
        "eval_every": 2,
        "gradient_accumulation": 2,
        "weight_decay": 0.01,
    }

    def kill(event: dict[str, Any]) -> None:
        if (event["event"], event.get("step")) == moment:
            raise Killed

    data = {"backbone": tiny_backbone(name), "examples": SHARED, "dev_examples": HELD_OUT}
    whole = train(config_for("whole", **options), **data)
    stopped = config_for("stopped", **options)
    with pytest.raises(Killed):
        train(stopped, **data, on_event=kill)
    torch.manual_seed(99)
    resumed = train(stopped, **data, resume=True)
    assert losses(resumed) == losses(whole)
    assert resumed.prefix.equal(whole.prefix)
    assert resumed.best_loss == whole.best_loss


def test_a_source_without_a_token_is_refused(tiny_backbone: Any, config_for: Callable[..., TrainConfig]):
    """The byte tokenizer adds nothing to it, and no encoder can read nothing."""
    with pytest.raises(DataError) as error:
        train(config_for(), backbone=tiny_backbone("bart"), examples=[*EIGHT, Example("", ("x",))])
    assert error.value.hint


def test_without_a_development_set_the_last_prefix_is_kept(tiny_backbone: Any, config_for: Callable[..., TrainConfig]):
    config = config_for(sites="cross=2,encoder=3")
    result = train(config, backbone=tiny_backbone("bart"), examples=EIGHT)
    state, _ = load_state(Path(config.output) / "state.safetensors")
    assert set(result.prefix.sites) == {"cross", "encoder"}
    for site in result.prefix.sites:
        assert torch.equal(flatten(result.prefix.layers[site]), state[f"module.sites.{site}.table"])


@pytest.mark.parametrize("name", ["bart", "m2m_100"])
def test_accumulation_is_one_large_batch(name: str, tiny_backbone: Any, config_for: Callable[..., TrainConfig]):
    options = {"targets_per_source": 1, "max_steps": 3}
    backbone = tiny_backbone(name)
    large = train(config_for("large", batch_size=6, **options), backbone=backbone, examples=SHARED)
    small = config_for("small", batch_size=2, gradient_accumulation=3, **options)
    assert losses(train(small, backbone=backbone, examples=SHARED)) == pytest.approx(losses(large), rel=1e-5)
