"""The paper's ablations against transformers alone: a prompt at the input layer, tokens between source and target."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from prefixtune.attention.cache import cache_argument
from prefixtune.attention.compute import compute_kv
from prefixtune.backbone.loss import batch_loss
from prefixtune.data.batching import pack
from prefixtune.data.encoding import TokenizedExample
from prefixtune.errors import ConfigError
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate_ids
from prefixtune.prefix.prefix import Prefix

Make = Callable[..., Any]
WITHOUT_WINDOW = ("gpt2", "llama", "opt", "gpt_neox", "qwen3")


@pytest.mark.parametrize("name", WITHOUT_WINDOW)
def test_a_prompt_is_worth_its_own_keys_and_values(
    name: str, tiny_backbone: Make, tiny_models: Make, random_ids: Make, assert_same: Make
) -> None:
    backbone, bare = tiny_backbone(name), tiny_models(name).requires_grad_(False)
    table = bare.get_input_embeddings()
    prompt = (torch.randn(5, table.weight.shape[1]) * 0.3).requires_grad_()
    ids = torch.tensor([random_ids(8)])
    expected = bare(inputs_embeds=torch.cat([prompt[None], table(ids)], dim=1)).logits[0, 5:]
    made = compute_kv(backbone.model, backbone.layout, inputs_embeds=prompt[None])
    logits = backbone.forward(ids, prefixes=made).logits[0]
    assert_same(logits, expected)
    (wanted,) = torch.autograd.grad(expected.square().sum(), prompt)
    (found,) = torch.autograd.grad(logits.square().sum(), prompt)
    assert_same(found, wanted)


def infix_of(prefix: Prefix) -> Prefix:
    return dataclasses.replace(prefix, header={"placement": "infix"})


def oracle_logits(model: Any, source: list[int], target: list[int], infix: Prefix) -> Tensor:
    """transformers' eager attention over a cache that holds the infix, masked from the source.

    The target begins with the source's last token.
    """
    from transformers import DynamicCache

    cache, count = DynamicCache(), infix.prefix_length
    for number, (key, value) in enumerate(infix.layers["decoder"]):
        cache.update(key[None], value[None], number)
    ids = [*source, *target]
    place = torch.arange(len(ids))
    hidden = place[:, None] < place[None, :]
    window = getattr(model.config, "sliding_window", None)
    if window is not None:
        hidden |= place[:, None] - place[None, :] >= window
    within = torch.arange(len(ids)) < len(source) - 1
    hidden = torch.cat([within[:, None].expand(-1, count), hidden], dim=1)
    mask = torch.zeros(1, 1, *hidden.shape).masked_fill_(hidden, torch.finfo(torch.float32).min)
    return model(
        input_ids=torch.tensor([ids]),
        attention_mask=mask,
        position_ids=(place + count * ~within)[None],
        **{cache_argument(model): cache},
    ).logits[0]


@pytest.fixture
def oracle(family: str, tiny_models: Make) -> Any:
    model = tiny_models(family).requires_grad_(False)
    model.set_attn_implementation("eager")
    return model


def test_a_packed_infix_is_transformers_own(
    backbone: Any, oracle: Any, random_prefix: Make, random_ids: Make, assert_same: Make
) -> None:
    infix = infix_of(random_prefix(backbone, 4))
    examples = [
        TokenizedExample(tuple(random_ids(6, 1)), (tuple(random_ids(5, 2)), tuple(random_ids(3, 3)))),
        TokenizedExample(tuple(random_ids(1, 4)), (tuple(random_ids(4, 5)),)),
    ]
    expected = []
    for example in examples:
        for target in example.targets:
            logits = oracle_logits(oracle, list(example.prompt), list(target), infix)[len(example.prompt) - 1 : -1]
            expected.append(F.cross_entropy(logits, torch.tensor(target), reduction="none"))
    losses = batch_loss(backbone, infix, pack(examples))
    assert_same(losses, torch.cat(expected))
    wanted = torch.autograd.grad(torch.cat(expected).sum(), infix.tensors())
    assert_same(torch.autograd.grad(losses.sum(), infix.tensors()), wanted)
    front = batch_loss(backbone, Prefix(infix.layers), pack(examples))
    assert not torch.allclose(front, losses)


@torch.no_grad()
def test_generation_with_an_infix_is_recomputation(
    backbone: Any, oracle: Any, random_prefix: Make, random_ids: Make
) -> None:
    prompts = [random_ids(7, 1), random_ids(1, 2), random_ids(4, 3), random_ids(5, 4)]
    prefixes = [infix_of(random_prefix(backbone, 4, 5)), infix_of(random_prefix(backbone, 6, 6))]
    prefixes += [infix_of(random_prefix(backbone, 2, 7)), random_prefix(backbone, 3, 8)]
    config = GenerateConfig(max_new_tokens=8)
    outputs = generate_ids(backbone, prompts, prefixes, config=config)
    for prompt, infix, output in list(zip(prompts, prefixes, outputs, strict=True))[:3]:
        written: list[int] = []
        while len(written) < config.max_new_tokens:
            token = int(oracle_logits(oracle, prompt, written, infix)[-1].argmax())
            if token == backbone.eos_id:
                break
            written.append(token)
        assert output == written
    assert outputs[3] == generate_ids(backbone, prompts[3:], prefixes[3:], config=config)[0]


@torch.no_grad()
def test_beams_with_infixes_are_each_row_alone(backbone: Any, random_prefix: Make, random_ids: Make) -> None:
    prompts = [random_ids(7, 1), random_ids(4, 3)]
    prefixes = [infix_of(random_prefix(backbone, 4, 5)), infix_of(random_prefix(backbone, 2, 7))]
    config = GenerateConfig(max_new_tokens=8, num_beams=3)
    alone = [generate_ids(backbone, [p], [q], config=config)[0] for p, q in zip(prompts, prefixes, strict=True)]
    assert generate_ids(backbone, prompts, prefixes, config=config) == alone


def test_an_infix_is_no_prefix(backbone: Any, random_prefix: Make, random_ids: Make) -> None:
    infix = infix_of(random_prefix(backbone, 4))
    with pytest.raises(ConfigError, match="infix"):
        backbone.forward(torch.tensor([random_ids(5)]), prefixes=infix)
