"""What other libraries for prefix-tuning get wrong on decoder-only models, beyond what the other files here test.

The faults were seen by running PEFT 0.21.2, adapters 1.3.0 and the authors' code on tiny random models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from prefixtune.backbone.loss import batch_loss
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.data import Example
from prefixtune.data.batching import pack
from prefixtune.data.encoding import TokenizedExample, encode_examples
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate_ids
from prefixtune.prefix.encoder import PrefixEncoder, fit
from prefixtune.prefix.prefix import save_prefix
from prefixtune.prefix.text_format import TextFormat
from prefixtune.training.config import TrainConfig
from prefixtune.training.score import evaluation_loss
from prefixtune.training.starts.words import from_words
from prefixtune.training.train import TrainResult, train

GREEDY = GenerateConfig(max_new_tokens=10)


@pytest.fixture(params=("gpt2", "llama", "mistral"))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@torch.no_grad()
def greedy_by_forward(backbone: Any, prompt: list[int], prefix: Any) -> list[int]:
    ids = list(prompt)
    for _ in range(GREEDY.max_new_tokens):
        ids.append(int(backbone.forward(torch.tensor([ids]), prefixes=prefix).logits[0, -1].argmax()))
        if ids[-1] == backbone.eos_id:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_padded_batch_keeps_the_prefix_and_its_gradient(
    name: str, tiny_backbone: Any, random_prefix: Any, random_ids: Any
):
    """adapters under sdpa: a padded batch equals the bare backbone, with a zero gradient."""
    backbone = tiny_backbone(name)
    prefix = random_prefix(backbone, 5)
    ids = torch.tensor([random_ids(8, 1), random_ids(8, 2)])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])
    logits, bare = backbone.forward(ids, mask, prefixes=prefix).logits, backbone.forward(ids, mask).logits
    for row in range(2):
        real = mask[row].bool()
        assert float((logits[row, real] - bare[row, real]).detach().abs().amax(-1).min()) > 1e-2
        # A single token's logits: those of a loss summed with equal weights may cancel out.
        for gradient in torch.autograd.grad(logits[row, -1, 3], prefix.tensors(), retain_graph=True):
            assert torch.all(gradient.abs().amax(-1) > 0)


def test_an_unpadded_batch_keeps_causality(backbone: Any, random_prefix: Any, random_ids: Any):
    """adapters under sdpa: in an unpadded batch a token sees those after it."""
    prefix = random_prefix(backbone, 5)
    ids = torch.tensor([random_ids(8, 1), random_ids(8, 2)])
    changed = ids.clone()
    changed[:, 5:] = torch.tensor(random_ids(3, 3))
    for mask in (None, torch.ones_like(ids)):
        with torch.no_grad():
            one = backbone.forward(ids, mask, prefixes=prefix).logits
            two = backbone.forward(changed, mask, prefixes=prefix).logits
        assert torch.equal(one[:, :5], two[:, :5])
        assert not torch.allclose(one[:, 5:], two[:, 5:])


def test_decoding_keeps_the_cache(backbone: Any, random_prefix: Any, random_ids: Any, monkeypatch: pytest.MonkeyPatch):
    """adapters on LLaMA: the key-value cache is lost, so every step computes the whole text again."""
    widths: list[int] = []
    original = backbone.model.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        widths.append(kwargs["input_ids"].shape[1])
        return original(*args, **kwargs)

    prefix, prompt = random_prefix(backbone, 5), random_ids(6)
    wanted = greedy_by_forward(backbone, prompt, prefix)
    monkeypatch.setattr(backbone.model, "forward", watched)
    (output,) = generate_ids(backbone, [prompt], [prefix], config=GREEDY)
    assert output == wanted
    assert widths[0] == len(prompt)
    assert widths[1:] == [1] * (len(widths) - 1)
    assert len(widths) >= len(output)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_grouped_query_attention(name: str, tmp_path: Path, tiny_backbone: Any):
    """adapters: ejecting fails with grouped-query attention. Here: MLP -> prefix -> file -> use."""
    backbone = tiny_backbone(name)
    heads = backbone.model.config.num_attention_heads
    assert {shape.num_kv_heads for shape in backbone.geometry["decoder"]} == {2} != {heads}
    module = PrefixEncoder("mlp", backbone.geometry, 4, embedding_size=32, bottleneck_size=8)
    baked = module.bake()
    loaded = load_prefix(save_prefix(tmp_path / "p.safetensors", baked), backbone)
    ids = torch.tensor([backbone.encode("some text")])
    with torch.no_grad():
        assert torch.equal(
            backbone.forward(ids, prefixes=loaded).logits, backbone.forward(ids, prefixes=module()).logits
        )


def test_train_mode_does_not_turn_dropout_on(
    family: str, backbone: Any, tiny_models: Any, random_prefix: Any, random_ids: Any
):
    """PEFT: `.train()` turns the frozen backbone's dropout on. These models' rates are 0.1 to 0.3."""
    ids, prefix = torch.tensor([random_ids(9)]), random_prefix(backbone, 4)
    bare = tiny_models(family).train()
    assert not torch.equal(bare(input_ids=ids).logits, bare(input_ids=ids).logits), "the model must have dropout"
    with torch.no_grad():
        expected = backbone.forward(ids, prefixes=prefix).logits
        backbone.model.train()
        assert torch.equal(backbone.forward(ids, prefixes=prefix).logits, expected)
        assert torch.equal(backbone.forward(ids, prefixes=prefix).logits, expected)


EXAMPLES = [Example(f"name : {name}", (f"{name} is a pub.", f"A pub: {name}.")) for name in ("Ann", "Bo", "Cy")]


def config_for(folder: Path, **changes: Any) -> TrainConfig:
    values = {
        "prefix_length": 4,
        "reparameterization": "none",
        "bottleneck_size": 64,
        "initialization": "random",
        "batch_size": 4,
        "targets_per_source": 1,
        "max_steps": 4,
        "warmup_steps": 1,
        "save_every": 1,
        "output": str(folder),
        **changes,
    }
    return TrainConfig(**values)


def test_the_mlp_is_no_part_of_the_artifact(tmp_path: Path, tiny_backbone: Any):
    """The authors, adapters and OpenDelta store the MLP: 103 MB in place of 1.97 MB at GPT-2 Medium, P = 10."""
    backbone = tiny_backbone("llama")
    result = train(config_for(tmp_path / "mlp", reparameterization="mlp"), backbone=backbone, examples=EXAMPLES)
    plain = train(config_for(tmp_path / "none"), backbone=backbone, examples=EXAMPLES)
    stored = sum(shape.size for shape in backbone.geometry["decoder"]) * 4
    assert result.prefix.num_parameters == stored == plain.num_trained
    assert result.num_trained > 20 * stored
    assert result.path.stat().st_size < 4 * stored + 8000
    assert result.path.stat().st_size == pytest.approx(plain.path.stat().st_size, abs=200)


def test_real_words_start_the_mlp(tiny_backbone: Any):
    """Nobody starts the MLP from real words' activations, though the authors recommend both."""
    backbone = tiny_backbone("gpt2")
    start = from_words(backbone, "Describe it", 6)
    torch.manual_seed(0)
    module = PrefixEncoder("mlp", backbone.geometry, 6, embedding_size=32, bottleneck_size=64, start=start)

    def distance() -> float:
        pairs = zip(module.bake().tensors(), start.tensors(), strict=True)
        return sum(float((one - other).square().sum()) for one, other in pairs)

    before = distance()
    fit(module, start, steps=300, learning_rate=1e-2)
    assert distance() < 0.02 * before


def test_words_fewer_than_positions_are_cycled(backbone: Any):
    """PEFT refuses a text shorter than the prefix."""
    text = "ab c"
    cycled = from_words(backbone, text, 10)
    spelled = from_words(backbone, "ab cab cab", 10)
    assert len(backbone.encode(text)) == 4
    assert cycled.prefix_length == 10
    assert cycled.equal(spelled)


def test_a_window_does_not_hide_the_prefix(tiny_backbone: Any, random_prefix: Any, random_ids: Any):
    """PEFT on Mistral: beyond the window, the prefix has no effect at all."""
    backbone = tiny_backbone("mistral", num_hidden_layers=1, sliding_window=4)
    one, other = random_prefix(backbone, 3, 1), random_prefix(backbone, 3, 2)
    prompt = random_ids(20)
    ids = torch.tensor([prompt])
    logits = backbone.forward(ids, prefixes=one).logits
    effect = (logits - backbone.forward(ids, prefixes=other).logits).detach().abs().amax(-1)[0]
    assert float(effect[4:].min()) > 1e-2
    for gradient in torch.autograd.grad(logits[0, -1, 0], one.tensors()):
        assert torch.all(gradient.abs().amax(-1) > 0)

    # The text's own window holds: with one layer, a token beyond it sees nothing of the text's start.
    changed = ids.clone()
    changed[0, :3] = torch.tensor(random_ids(3, seed=9))
    after = backbone.forward(changed, prefixes=one).logits
    assert torch.equal(after[0, 6:], logits[0, 6:])
    assert not torch.allclose(after[0, 3], logits[0, 3])

    # And while decoding with the cache.
    for prefix in (one, other):
        assert generate_ids(backbone, [prompt], [prefix], config=GREEDY) == [
            greedy_by_forward(backbone, prompt, prefix)
        ]
    assert greedy_by_forward(backbone, prompt, one) != greedy_by_forward(backbone, prompt, other)


def test_the_final_evaluation_is_on_the_development_set(tmp_path: Path, tiny_backbone: Any):
    """The authors' code reports its final evaluation on the training set."""
    backbone = tiny_backbone("llama")
    held_out = [Example("name : Zed", ("Zed, a place to eat.",))]
    result: TrainResult = train(
        config_for(tmp_path, learning_rate=1e-3, eval_every=2),
        backbone=backbone,
        examples=EXAMPLES,
        dev_examples=held_out,
    )

    def loss(examples: list[Example]) -> float:
        encoding = encode_examples(backbone, examples, TextFormat(), prefix_length=4)
        return evaluation_loss(backbone, result.prefix, encoding.examples)

    assert result.best_loss == pytest.approx(loss(held_out), rel=1e-6)
    assert result.best_loss != pytest.approx(loss(EXAMPLES), rel=1e-2)


def test_a_batch_of_losses_is_pytorchs_on_the_same_logits(tiny_backbone: Any, random_prefix: Any):
    """PEFT trains with what `forward` gives; here the training's losses are those that a user can compute."""
    backbone = tiny_backbone("gpt2")
    prefix = random_prefix(backbone, 4)
    prompt, target = backbone.encode(" name : Ann <s>"), [*backbone.encode(" Ann is. "), backbone.eos_id]
    losses = batch_loss(backbone, prefix, pack([TokenizedExample(tuple(prompt), (tuple(target),))]))
    logits: Tensor = backbone.forward(torch.tensor([[*prompt, *target]]), prefixes=prefix).logits[0]
    expected = F.cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(target), reduction="none")
    assert torch.allclose(losses, expected, rtol=1e-5, atol=1e-5)


def test_generation_never_touches_another_call(tiny_backbone: Any, random_prefix: Any, random_ids: Any):
    """litgpt keeps a hidden cache on its modules; here nothing stays behind from call to call."""
    backbone, prompt = tiny_backbone("llama"), random_ids(6)
    one, other = random_prefix(backbone, 5, 1), random_prefix(backbone, 3, 2)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        bare, first = backbone.forward(ids).logits, backbone.forward(ids, prefixes=one).logits
        generate_ids(backbone, [prompt], [other], config=GREEDY)
        assert torch.equal(backbone.forward(ids, prefixes=one).logits, first)
        assert torch.equal(backbone.forward(ids).logits, bare)
