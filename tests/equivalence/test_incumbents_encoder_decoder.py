"""What other libraries for prefix-tuning get wrong on encoder-decoders, beyond what `test_encoder_decoder.py` tests.

The faults were seen by running PEFT 0.21.2, adapters 1.3.0 and the authors' code on tiny random models.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixtune.backbone.loss import batch_loss
from prefixtune.data import Example
from prefixtune.data.batching import collate
from prefixtune.data.encoding import TokenizedExample
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate_ids
from prefixtune.training.config import TrainConfig
from prefixtune.training.starts.build import build_encoder
from prefixtune.training.train import train

GREEDY = GenerateConfig(max_new_tokens=10)
SITES = ("encoder", "decoder", "cross")


@pytest.fixture(scope="module", params=["bart", "t5"])
def backbone(request: pytest.FixtureRequest, tiny_backbone: Any) -> Any:
    """Shared: leave it as it is. In both the decoder is deeper than the encoder; in BART, head counts differ too."""
    return tiny_backbone(request.param)


@torch.no_grad()
def greedy_by_forward(backbone: Any, prompt: list[int], prefix: Any) -> list[int]:
    ids = [backbone.decoder_start_id]
    for _ in range(GREEDY.max_new_tokens):
        read = torch.tensor([ids])
        logits = backbone.forward(torch.tensor([prompt]), decoder_input_ids=read, prefixes=prefix).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == backbone.eos_id:
            return ids[1:-1]
    return ids[1:]


EXAMPLES = [Example(f"name : {name}", (f"{name} is a pub.", f"A pub: {name}.")) for name in ("Ann", "Bo", "Cy")]


def config_for(folder: Path, **changes: Any) -> TrainConfig:
    values = {
        "prefix_length": 4,
        "reparameterization": "none",
        "bottleneck_size": 64,
        "initialization": "random",
        "batch_size": 4,
        "targets_per_source": 2,
        "max_steps": 4,
        "warmup_steps": 1,
        "save_every": 1,
        "output": str(folder),
        **changes,
    }
    return TrainConfig(**values)


def test_layers_do_not_share_prefixes_and_no_slot_is_dead(backbone: Any, tmp_path: Path, random_ids: Any):
    """PEFT: layers i and i + L/2 share one prefix, and half of what is trained never gets a gradient."""
    config = config_for(tmp_path / "run")
    module, _ = build_encoder(config, backbone)
    stored = sum(shape.size for shapes in backbone.geometry.values() for shape in shapes) * 4
    assert sum(parameter.numel() for parameter in module.parameters()) == stored
    example = TokenizedExample(tuple(random_ids(8, 1)), (tuple(random_ids(4, 2)), tuple(random_ids(6, 3))))
    weights = torch.rand(10, generator=torch.Generator().manual_seed(4))
    (batch_loss(backbone, module(), collate(backbone, [example])) * weights).sum().backward()
    for name, parameter in module.named_parameters():
        assert torch.all(parameter.grad != 0), f"{name} has dead numbers"

    trained = train(config, backbone=backbone, examples=EXAMPLES).prefix
    for site, shapes in backbone.geometry.items():
        for pair in itertools.combinations(range(len(shapes)), 2):
            for one, other in zip(*(trained.layers[site][number] for number in pair), strict=True):
                assert not torch.isclose(one, other).all(-1).any(), f"{site} layers {pair} share positions"


def test_a_padded_batch_keeps_the_prefix_and_its_gradient(backbone: Any, random_prefix: Any, random_ids: Any):
    """adapters under sdpa: a padded batch equals the bare backbone, with a zero gradient."""
    prefix = random_prefix(backbone, 5)
    ids, read = (torch.tensor([random_ids(8, n), random_ids(8, n + 1)]) for n in (1, 3))
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0], [1] * 8])
    given = {"decoder_input_ids": read, "decoder_attention_mask": mask}
    logits, bare = backbone.forward(ids, mask, prefixes=prefix, **given).logits, backbone.forward(ids, mask, **given)
    for row, last in ((0, 4), (1, 7)):
        real = mask[row].bool()
        assert float((logits[row, real] - bare.logits[row, real]).detach().abs().amax(-1).min()) > 1e-2
        # A single token's logits: those of a loss summed with equal weights may cancel out.
        for gradient in torch.autograd.grad(logits[row, last, 3], prefix.tensors(), retain_graph=True):
            assert torch.all(gradient.abs().amax(-1) > 0)


@torch.no_grad()
def test_an_unpadded_batch_keeps_causality(backbone: Any, random_prefix: Any, random_ids: Any):
    """adapters under sdpa: in an unpadded batch a token sees those after it. The encoder sees all, as it should."""
    prefix = random_prefix(backbone, 5)
    ids, read = (torch.tensor([random_ids(8, n), random_ids(8, n + 1)]) for n in (1, 3))
    changed = read.clone()
    changed[:, 5:] = torch.tensor(random_ids(3, 9))
    for mask in (None, torch.ones_like(read)):
        given = {"decoder_attention_mask": mask, "prefixes": prefix}
        one = backbone.forward(ids, mask, decoder_input_ids=read, **given).logits
        two = backbone.forward(ids, mask, decoder_input_ids=changed, **given).logits
        assert torch.equal(one[:, :5], two[:, :5])
        assert not torch.allclose(one[:, 5:], two[:, 5:])
        source = ids.clone()
        source[:, -1] = (source[:, -1] + 1) % 90
        other = backbone.forward(source, mask, decoder_input_ids=read, **given).logits
        assert float((other - one).abs().amax(-1).min()) > 1e-3


def test_decoding_keeps_the_cache(backbone: Any, random_prefix: Any, random_ids: Any):
    """adapters on LLaMA: the key-value cache is lost. Here source and written tokens are read once."""
    widths: dict[str, list[int]] = {"encoder": [], "decoder": [], "cross": []}
    firsts = {place[0]: module for module, place in backbone.layout.layer_of.items() if place[1] == 0}
    handles = []
    for site, module in firsts.items():
        linear = module.k_proj if hasattr(module, "k_proj") else module.k
        handles.append(
            linear.register_forward_hook(lambda _, args, __, site=site: widths[site].append(args[0].shape[1]))
        )
    prefix, prompt = random_prefix(backbone, 5), random_ids(6)
    (output,) = generate_ids(backbone, [prompt], [prefix], config=GREEDY)
    for handle in handles:
        handle.remove()
    assert output == greedy_by_forward(backbone, prompt, prefix)
    # The source is read once, and every written token alone. Beside them, a row of one token stands for what is not
    # read again, and T5's bias is asked for once.
    assert [widths[site].count(6) for site in ("encoder", "cross")] == [1, 1]
    assert {*widths["encoder"], *widths["cross"]} == {1, 6}
    assert sorted(widths["decoder"])[:-1] == [1] * (len(widths["decoder"]) - 1)
    assert len(widths["decoder"]) >= len(output)


@pytest.mark.parametrize("family", ["bart", "pegasus", "t5", "m2m_100"])
def test_train_mode_does_not_turn_dropout_on(
    family: str, tiny_models: Any, tiny_backbone: Any, random_prefix: Any, random_ids: Any
):
    """PEFT: `.train()` turns the frozen backbone's dropout on; so does the authors' BART."""
    backbone = tiny_backbone(family)
    ids, read, prefix = torch.tensor([random_ids(9)]), torch.tensor([random_ids(6)]), random_prefix(backbone, 4)
    bare = tiny_models(family).train()
    given = {"input_ids": ids, "decoder_input_ids": read}
    assert not torch.equal(bare(**given).logits, bare(**given).logits), "the model must have dropout"
    with torch.no_grad():
        expected = backbone.forward(**given, prefixes=prefix).logits
        backbone.model.train()
        assert torch.equal(backbone.forward(**given, prefixes=prefix).logits, expected)
        assert torch.equal(backbone.forward(**given, prefixes=prefix).logits, expected)


def test_a_window_does_not_hide_the_prefix(tiny_backbone: Any, random_prefix: Any, random_ids: Any):
    """PEFT on Mistral: beyond the window, the prefix has no effect. T5Gemma has windows in encoder and decoder."""
    part = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "layer_types": ["sliding_attention"],
        "sliding_window": 4,
    }
    backbone = tiny_backbone("t5gemma", encoder=part, decoder=part)
    ids, read = torch.tensor([random_ids(20, 1)]), torch.tensor([random_ids(20, 2)])
    for site in ("encoder", "decoder"):
        prefix = random_prefix(backbone, {site: 3})
        hidden: list[torch.Tensor] = []
        layer = getattr(backbone.model.model, site).layers[0].self_attn
        handle = layer.register_forward_hook(lambda _, __, output, into=hidden: into.append(output[0][0]))
        logits = backbone.forward(ids, decoder_input_ids=read, prefixes=prefix).logits
        backbone.forward(ids, decoder_input_ids=read)
        handle.remove()
        # The prefix reaches every position of the site's own attention, those beyond the window too.
        assert float((hidden[0] - hidden[1]).detach().abs().amax(-1).min()) > 1e-3
        for gradient in torch.autograd.grad(logits[0, -1, 0], prefix.tensors()):
            assert torch.all(gradient.abs().amax(-1) > 0)

    # The text's own window holds: with one layer, a token beyond it sees nothing of the target's start.
    prefix = random_prefix(backbone, 3)
    changed = read.clone()
    changed[0, :3] = torch.tensor(random_ids(3, seed=9))
    with torch.no_grad():
        one, two = (
            backbone.forward(ids, decoder_input_ids=given, prefixes=prefix).logits[0] for given in (read, changed)
        )
    assert torch.equal(one[6:], two[6:])
    assert not torch.allclose(one[3], two[3])

    # And while decoding with the cache.
    prompt = random_ids(20, 1)
    assert generate_ids(backbone, [prompt], [prefix], config=GREEDY) == [greedy_by_forward(backbone, prompt, prefix)]


@pytest.mark.parametrize(
    ("name", "changes", "shapes"),
    [
        ("bart", {"encoder_attention_heads": 2, "decoder_attention_heads": 8}, {"encoder": (2, 2), "cross": (3, 8)}),
        ("bart", {"encoder_layers": 4, "decoder_layers": 1}, {"encoder": (4, 4), "decoder": (1, 2)}),
        ("t5", {"d_kv": 20, "num_heads": 3}, {"encoder": (2, 3), "decoder": (3, 3)}),
    ],
)
def test_heads_and_depths_may_differ(
    name: str,
    changes: dict[str, int],
    shapes: dict[str, tuple[int, int]],
    tmp_path: Path,
    tiny_backbone: Any,
    random_ids: Any,
):
    """Others fail on different head counts or depths of both halves, and on a T5 with heads * d_kv != d_model."""
    backbone = tiny_backbone(name, **changes)
    for site, (layers, count) in shapes.items():
        assert len(backbone.geometry[site]) == layers
        assert {shape.num_kv_heads for shape in backbone.geometry[site]} == {count}
    if name == "t5":
        assert {shape.num_kv_heads * shape.key_dim for shape in backbone.geometry["cross"]} != {backbone.hidden_size}
    config = config_for(tmp_path / "run", max_steps=2, learning_rate=0.5, initialization="words")
    prefix = train(config, backbone=backbone, examples=EXAMPLES).prefix
    prompt = random_ids(6)
    assert generate_ids(backbone, [prompt], [prefix], config=GREEDY) == [greedy_by_forward(backbone, prompt, prefix)]
    wide = GenerateConfig(max_new_tokens=10, num_beams=3)
    assert generate_ids(backbone, [prompt, prompt[:3]], [prefix, None], config=wide) == [
        generate_ids(backbone, [text], [one], config=wide)[0] for text, one in ((prompt, prefix), (prompt[:3], None))
    ]
