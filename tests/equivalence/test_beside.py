"""Training with others beside: the loss and gradients of one prefix made by hand of all parts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import prefixtune as pt
from prefixtune.backbone.loss import batch_loss
from prefixtune.data.batching import pad
from prefixtune.data.encoding import TokenizedExample
from prefixtune.prefix.prefix import Prefix
from prefixtune.training import beside as beside_module
from prefixtune.training.beside import Beside, Neighbours
from prefixtune.training.data import tokenize
from prefixtune.training.loop import TrainLoop, forward_backward
from prefixtune.training.schedule import optimizer_steps
from prefixtune.training.starts.build import build_encoder
from prefixtune.training.variation import vary

pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")

EXAMPLES = [pt.Example(f"n : {letter}", (f"{letter}{letter} it is.", f"it is {letter}")) for letter in "abcd"]
LENGTHS = (3, 2, 4)


def moved_on(backbone: Any, prefix: Prefix, offset: int) -> Prefix:
    """Keys turned by the model's own rotary embedding at position `offset`; others as they are."""
    if not hasattr(backbone.model.base_model, "rotary_emb"):
        return prefix
    rotary = backbone.model.base_model.rotary_emb
    cos, sin = (part[0, 0] for part in rotary(torch.zeros(1, 1, 8), torch.tensor([[offset]])))
    size = cos.shape[0]

    def turn(key: Tensor) -> Tensor:
        first, rest = key[..., :size], key[..., size:]
        half = torch.cat([-first[..., size // 2 :], first[..., : size // 2]], dim=-1)
        return torch.cat([first * cos + half * sin, rest], dim=-1)

    return Prefix({"decoder": tuple((turn(key), value) for key, value in prefix.layers["decoder"])})


def one_after_the_other(backbone: Any, parts: list[Prefix]) -> Prefix:
    offsets = [sum(part.length("decoder") for part in parts[:index]) for index in range(len(parts))]
    turned = [moved_on(backbone, part, offset) for part, offset in zip(parts, offsets, strict=True)]
    return Prefix(
        {
            site: tuple(
                (torch.cat([k for k, _ in layer], 1), torch.cat([v for _, v in layer], 1))
                for layer in zip(*(part.layers[site] for part in turned), strict=True)
            )
            for site in parts[0].sites
        }
    )


def loop_of(backbone: Any, others: list[Prefix], tmp_path: Path, **options: Any) -> TrainLoop:
    config = pt.TrainConfig(
        prefix_length=5, init_text="ab", beside="others", output=str(tmp_path), batch_size=8, **options
    )
    data = tokenize(config, backbone, EXAMPLES, [])
    encoder, start = build_encoder(config, backbone, examples=data.train.examples)
    loop = TrainLoop(config, backbone, data, encoder, start.description)
    loop.stand_beside(Beside.of_prefixes([other.detach() for other in others], backbone.rotation))
    return loop


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others stand beside in every step."""
    monkeypatch.setattr(beside_module, "BESIDE_RATE", 1.0)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mistral", "gpt2", "bart", "t5", "m2m_100"])
def test_a_step_is_that_of_a_prefix_joined_by_hand(
    name: str, tiny_backbone: Callable[..., Any], random_prefix: Any, tmp_path: Path, assert_same: Any
) -> None:
    backbone = tiny_backbone(name)
    others = [random_prefix(backbone, length, seed, 0.3) for seed, length in enumerate(LENGTHS)]
    loop = loop_of(backbone, others, tmp_path, seed=3)
    beside = loop.beside
    assert beside is not None
    seen = set()
    for batches in loop.remaining_steps():
        drawn = beside.draw(loop.config, loop.state.step + 1)
        seen.add(drawn)
        step = loop.prepare(batches)
        forward_backward(backbone, [step])
        assert step.prefix_leaf is not None
        own = step.prefix_leaf.leaves()
        parts = [*(others[i].detach() for i in drawn.before), own, *(others[i].detach() for i in drawn.after)]
        (batch,) = step.batches
        losses = batch_loss(backbone, one_after_the_other(backbone, parts), batch)
        loss = (losses * step.weights[0]).sum()
        loss.backward()
        assert step.loss == pytest.approx(float(loss.detach()), rel=1e-5)
        assert_same([t.grad for t in step.prefix_leaf.tensors()], [t.grad for t in own.tensors()])
        loop.apply(step, threading.Event())
        if loop.state.step == 4:
            break
    assert len(seen) > 1


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("name", ["llama", "bart"])
def test_hidden_positions_and_lengths_are_those_of_the_own_part(
    name: str, tiny_backbone: Callable[..., Any], random_prefix: Any, tmp_path: Path, assert_same: Any
) -> None:
    """Nested, dropped and joined at once: against a prefix of the visible rows, with the text where it was."""
    backbone = tiny_backbone(name)
    others = [random_prefix(backbone, length, seed, 0.3).detach() for seed, length in enumerate(LENGTHS)]
    loop = loop_of(backbone, others, tmp_path, nested=True, prefix_dropout=0.5, seed=5)
    beside = loop.beside
    assert beside is not None
    steps = loop.remaining_steps()
    for number in (1, 2, 3):
        drawn = beside.draw(loop.config, number)
        step = loop.prepare(next(steps))
        leaf = step.prefix_leaf
        assert leaf is not None
        (raw,) = optimizer_steps(loop.config, loop.data.train.examples, epoch=number - 1)
        expected = []
        for group in vary(loop.config, number, raw, {"decoder": 5}, one_length=False)[0]:
            own = leaf[: group.visible_length]
            before = sum(LENGTHS[i] for i in drawn.before)
            parts = [*(others[i] for i in drawn.before), own, *(others[i] for i in drawn.after)]
            whole = one_after_the_other(backbone, parts)
            hidden = {before + position for position in group.hidden if position < own.prefix_length}
            kept = [position for position in range(whole.prefix_length) if position not in hidden]
            expected.append(visible_losses(backbone, whole, kept, group))
        fronts = step.prefixes(0)
        assert_same(batch_loss(backbone, fronts, step.batches[0]), torch.cat(expected))
        loop.state.step += 1


@torch.no_grad()
def visible_losses(backbone: Any, whole: Prefix, kept: list[int], group: TokenizedExample) -> Tensor:
    """Losses of a group with some rows of a prefix alone; a decoder-only model's text begins after all of them."""
    start = backbone.decoder_start_id if backbone.kind == "encoder-decoder" else None
    plain = TokenizedExample(group.prompt, group.targets)
    batch = pad([plain], pad_id=backbone.pad_id, decoder_start_id=start)
    if backbone.kind == "encoder-decoder":
        rows = {site: range(whole.length(site)) if site == "decoder" else kept for site in whole.sites}
        shorter = {
            site: tuple((key[:, rows[site]], value[:, rows[site]]) for key, value in layers)
            for site, layers in whole.layers.items()
        }
        return batch_loss(backbone, Prefix(shorter), batch)
    losses = []
    for target in group.targets:
        cache = DynamicCache()
        for layer, (key, value) in enumerate(whole.layers["decoder"]):
            cache.update(key[None, :, kept], value[None, :, kept], layer)
        ids = torch.tensor([[*group.prompt, *target]])
        positions = whole.prefix_length + torch.arange(ids.shape[1])[None]
        logits = backbone.model(input_ids=ids, past_key_values=cache, position_ids=positions).logits[0]
        first = len(group.prompt) - 1
        losses.append(torch.nn.functional.cross_entropy(logits[first:-1], torch.tensor(target), reduction="none"))
    return torch.cat(losses)


def test_who_stands_beside_is_drawn_by_seed_and_step(tiny_backbone: Any, random_prefix: Any) -> None:
    backbone = tiny_backbone("gpt2")
    beside = Beside.of_prefixes([random_prefix(backbone, 1).detach()] * 5, backbone.rotation)
    config = pt.TrainConfig(beside="x", beside_most=3)
    drawn = [beside.draw(config, step) for step in range(1, 2001)]
    assert drawn == [beside.draw(config, step) for step in range(1, 2001)]
    assert drawn != [beside.draw(config.replace(seed=1), step) for step in range(1, 2001)]
    joined = [each for each in drawn if each != Neighbours()]
    assert len(joined) / 2000 == pytest.approx(0.5, abs=0.05)
    counts = [len(each.before) + len(each.after) for each in joined]
    assert [counts.count(number) / len(joined) for number in (1, 2, 3)] == pytest.approx([1 / 3] * 3, abs=0.06)
    assert all(len({*each.before, *each.after}) == count for each, count in zip(joined, counts, strict=True))
    # The own is at each place as often: first in a half of the pairs.
    pairs = [each for each, count in zip(joined, counts, strict=True) if count == 1]
    assert sum(not each.before for each in pairs) / len(pairs) == pytest.approx(0.5, abs=0.1)
    assert {index for each in joined for index in (*each.before, *each.after)} == set(range(5))
