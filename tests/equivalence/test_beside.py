"""Training with others beside: the losses and gradients of prefixes joined by hand, sample by sample."""

import contextlib
import itertools
import threading

import pytest
import torch

import prefixtune as pt
from oracles import behind_cache, cache_of
from prefixtune.backbone.loss import batch_loss
from prefixtune.data.batching import collate, pad
from prefixtune.data.encoding import TokenizedExample
from prefixtune.prefix.prefix import Prefix
from prefixtune.training.beside import Beside
from prefixtune.training.data import tokenize
from prefixtune.training.loop import TrainLoop, forward_backward
from prefixtune.training.prepare import prepare
from prefixtune.training.schedule import optimizer_steps, vary
from prefixtune.training.starts.build import build_encoder
from prefixtune.training.together import begin_together, take_steps

pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")

EXAMPLES = [pt.Example(f"n : {letter}", (f"{letter}{letter} it is.", f"it is {letter}")) for letter in "abcd"]
LENGTHS = (3, 2, 4)


def moved_on(backbone, prefix, offset):
    """Keys turned by the model's own rotary embedding at position `offset`; others as they are."""
    if not hasattr(backbone.model.base_model, "rotary_emb"):
        return prefix
    rotary = backbone.model.base_model.rotary_emb
    cos, sin = (part[0, 0] for part in rotary(torch.zeros(1, 1, 8), torch.tensor([[offset]])))
    size = cos.shape[0]

    def turn(key):
        first, rest = key[..., :size], key[..., size:]
        half = torch.cat([-first[..., size // 2 :], first[..., : size // 2]], dim=-1)
        return torch.cat([first * cos + half * sin, rest], dim=-1)

    return Prefix({"decoder": tuple((turn(key), value) for key, value in prefix.layers["decoder"])})


def right_before_the_text(backbone, parts):
    """One behind the other, each moved on so that it ends where the text begins."""
    total = sum(part.length("decoder") for part in parts)
    offsets = [total - part.length("decoder") for part in parts]
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


def loop_of(backbone, others, tmp_path, **options):
    config = pt.TrainConfig(
        prefix_length=5, init_text="ab", beside="others", output=str(tmp_path), batch_size=8, **options
    )
    data = tokenize(config, backbone, EXAMPLES, [])
    encoder, start = build_encoder(config, backbone, examples=data.train.examples)
    loop = TrainLoop(config, backbone, data, encoder, start.description)
    loop.stand_beside(Beside.of_prefixes([other.detach() for other in others], backbone.rotation))
    return loop


def front_of(backbone, company, own, others):
    """What is in front of a sample, joined by hand."""
    return right_before_the_text(backbone, [own, *(others[number] for number in company)])


def samples_of(loop, step):
    """The samples of a step, and who is in front of each."""
    assert loop.beside is not None
    (raw,) = next(iter(optimizer_steps(loop.config, loop.data.train.examples, epoch=step - 1)))
    # Padded rows share what is in front.
    numbers = itertools.count() if loop.backbone.layout.packable else itertools.repeat(0)
    drawn = [(loop.beside.draw(loop.config, step, number), one) for number, one in zip(numbers, raw, strict=False)]
    return sorted(drawn, key=lambda sample: sample[0])


def loss_by_hand(loop, step, own, others):
    """The loss of a step, each sample by itself: sums over targets, and their mean over the step."""
    backbone, samples = loop.backbone, samples_of(loop, step)
    losses = [
        batch_loss(backbone, front_of(backbone, company, own, others), collate(backbone, [one])).sum()
        for company, one in samples
    ]
    return torch.stack(losses).sum() / sum(one.num_targets for _, one in samples)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mistral", "gpt2", "bart", "t5", "m2m_100"])
def test_a_step_is_that_of_prefixes_joined_by_hand(name, tiny_backbone, random_prefix, tmp_path, assert_same):
    backbone = tiny_backbone(name)
    others = [random_prefix(backbone, length, seed, 0.3).detach() for seed, length in enumerate(LENGTHS)]
    loop = loop_of(backbone, others, tmp_path, seed=3)
    seen = set()
    for batches in loop.remaining_steps():
        number = loop.state.step + 1
        seen |= {company for company, _ in samples_of(loop, number)}
        step = loop.prepare(batches)
        forward_backward(backbone, [step])
        assert step.prefix_leaf is not None
        own = step.prefix_leaf.leaves()
        loss = loss_by_hand(loop, number, own, others)
        loss.backward()
        assert step.loss == pytest.approx(float(loss.detach()), rel=1e-5)
        assert_same([t.grad for t in step.prefix_leaf.tensors()], [t.grad for t in own.tensors()])
        loop.apply(step, threading.Event())
        if loop.state.step == 4:
            break
    assert () in seen
    assert {len(company) for company in seen} >= {0, 3}


def open_runs(stack, backbone, tmp_path, max_steps):
    """Three runs beside each other, of unequal lengths."""
    usual = {"batch_size": 8, "beside": "self", "max_steps": max_steps}
    configs = [
        pt.TrainConfig(prefix_length=length, init_text=text, output=str(tmp_path / text), **usual)
        for length, text in ((3, "abc"), (2, "de"), (4, "fghi"))
    ]
    runs = [stack.enter_context(prepare(one, backbone, EXAMPLES, shares_passes=True, begin=False)) for one in configs]
    begin_together(runs)
    return runs


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_joined_gradient_is_the_sum_of_one_sided_ones(name, tiny_backbone, tmp_path, assert_same, monkeypatch):
    """Of each run: the gradients that each run's loss has at it, while all others are constants."""
    backbone = tiny_backbone(name)
    checked = []

    def check(loop, step, stop, apply=TrainLoop.apply):
        leaf = step.prefix_leaf
        assert leaf is not None
        index, number = loops.index(loop), loop.state.step + 1
        current = [one.bake() for one in loops] if index == 0 else checked[-1][0]
        if index == 0:
            checked.append((current, {}))
        expected = [torch.zeros_like(tensor) for tensor in leaf.tensors()]
        for other, one in enumerate(loops):
            parts = [prefix.detach() for prefix in current]
            parts[index] = parts[index].leaves()
            loss_by_hand(one, number, parts[other], parts[:other] + parts[other + 1 :]).backward()
            for total, tensor in zip(expected, parts[index].tensors(), strict=True):
                total += 0 if tensor.grad is None else tensor.grad
        assert_same([tensor.grad for tensor in leaf.tensors()], expected)
        return apply(loop, step, stop)

    monkeypatch.setattr(TrainLoop, "apply", check)
    with contextlib.ExitStack() as stack:
        runs = open_runs(stack, backbone, tmp_path, max_steps=3)
        loops = [run.loop for run in runs]
        list(take_steps(backbone, runs, threading.Event()))
    assert len(checked) == 3


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_hidden_positions_and_lengths_are_those_of_the_own_part(
    name, tiny_backbone, random_prefix, tmp_path, assert_same
):
    """Nested, dropped and joined at once: against a prefix of the visible rows, with the text where it was."""
    backbone = tiny_backbone(name)
    others = [random_prefix(backbone, length, seed, 0.3).detach() for seed, length in enumerate(LENGTHS)]
    loop = loop_of(backbone, others, tmp_path, nested=True, prefix_dropout=0.5, seed=5)
    beside = loop.beside
    assert beside is not None
    steps = loop.remaining_steps()
    for number in (1, 2, 3):
        step = loop.prepare(next(steps))
        leaf = step.prefix_leaf
        assert leaf is not None
        (raw,) = optimizer_steps(loop.config, loop.data.train.examples, epoch=number - 1)
        expected = []
        varied = vary(loop.config, number, raw, {"decoder": 5}, one_length=False)[0]
        drawn = [(beside.draw(loop.config, number, sample), group) for sample, group in enumerate(varied)]
        for company, group in sorted(drawn, key=lambda sample: sample[0]):
            own = leaf[: group.front.length]
            whole = front_of(backbone, company, own, others)
            hidden = {position for position in group.hidden if position < own.prefix_length}
            kept = [position for position in range(whole.prefix_length) if position not in hidden]
            expected.append(visible_losses(backbone, whole, kept, group))
        assert_same(batch_loss(backbone, step.prefixes(0), step.batches[0]), torch.cat(expected))
        loop.state.step += 1


@torch.no_grad()
def visible_losses(backbone, whole, kept, group):
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
        ids = torch.tensor([[*group.prompt, *target]])
        logits = behind_cache(backbone.model, cache_of(whole, kept), ids, whole.prefix_length).logits[0]
        first = len(group.prompt) - 1
        losses.append(torch.nn.functional.cross_entropy(logits[first:-1], torch.tensor(target), reduction="none"))
    return torch.cat(losses)


def test_who_stands_beside_is_drawn_by_seed_step_and_sample(tiny_backbone, random_prefix):
    backbone = tiny_backbone("gpt2")
    beside = Beside.of_prefixes([random_prefix(backbone, 1).detach()] * 4, backbone.rotation)
    config = pt.TrainConfig(beside="x", beside_most=3)
    places = [(step, sample) for step in range(1, 201) for sample in range(10)]
    drawn = [beside.draw(config, *place) for place in places]
    assert drawn == [beside.draw(config, *place) for place in places]
    assert drawn != [beside.draw(config.replace(seed=1), *place) for place in places]
    assert len({*drawn[:10]}) > 4
    joined = [company for company in drawn if company]
    assert len(joined) / 2000 == pytest.approx(0.6, abs=0.05)
    counts = [len(company) for company in joined]
    assert [counts.count(n) / len(joined) for n in (1, 2, 3)] == pytest.approx([0.1, 0.1, 0.8], abs=0.05)
    assert all(company == tuple(sorted({*company})) for company in joined)
    assert {number for company in joined for number in company} == {*range(4)}
