"""Penalties, min_p and biases against transformers' own processors, in one running batch and in `generate`."""

from collections import Counter

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from engine_runs import EvenNumbers, alone, drawn, ids
from prefixtune.engine.config import EngineConfig
from prefixtune.engine.engine import TorchEngine
from prefixtune.engine.request import Request, SamplingParams

NEW = 12
RULES = [
    {},
    {"repetition_penalty": 1.7},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.8},
    {"frequency_penalty": -0.5, "presence_penalty": -1.0},
    {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.3},
    {"logit_bias": {7: 4.0, 9: -100.0, 30: 2.5}},
    {"logit_bias": {7: 4.0, 11: -3.0}, "repetition_penalty": 1.3, "frequency_penalty": 1.1, "min_new_tokens": 5},
    {"repetition_penalty": 0.8},
    {"min_p": 0.4},
]


@torch.no_grad()
def expected_text(backbone, request):
    """Greedy, with the whole text computed anew for every token, and transformers' processors."""
    params, new = request.sampling, []
    for _ in range(params.max_new_tokens):
        text = torch.tensor([[*request.prompt, *new]])
        scores = backbone.forward(text, prefixes=request.prefix).logits[:, -1].float()
        if len(new) < params.min_new_tokens:
            scores[:, backbone.eos_id] = -float("inf")
        if params.logit_bias:
            scores = SequenceBiasLogitsProcessor([[[id], bias] for id, bias in params.logit_bias.items()])(text, scores)
        if params.repetition_penalty != 1:
            scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(text, scores)
        for token, count in Counter(new).items():
            scores[0, token] -= count * params.frequency_penalty + params.presence_penalty
        token = int(scores.argmax())
        if token == backbone.eos_id:
            break
        new.append(token)
    return new


def test_rules_in_one_running_batch_are_transformers_and_generates(made, random_ids, random_prefix):
    backbone = made("llama")
    prefixes = [None, random_prefix(backbone, 6, 2).detach()]
    requests = [
        Request(tuple(random_ids(3 + number, number)), prefix, SamplingParams(**{"max_new_tokens": NEW, **rules}))
        for number, rules in enumerate(RULES)
        for prefix in prefixes
    ]
    outputs = TorchEngine(backbone, EngineConfig(num_slots=7, prefill_tokens=6)).run(requests)
    texts = [ids(output) for (output,) in outputs]
    assert texts == [expected_text(backbone, request) for request in requests]
    # The rules change something.
    for number in (1, 3, 5, 7):
        some = slice(len(prefixes) * number, len(prefixes) * (number + 1))
        without = [Request(r.prompt, r.prefix, SamplingParams(max_new_tokens=NEW)) for r in requests[some]]
        assert [expected_text(backbone, request) for request in without] != texts[some]
    # `generate`, without the bias, which only requests have.
    for request, text in zip(requests, texts, strict=True):
        rules = request.sampling.model_dump(exclude_unset=True)
        if "logit_bias" not in rules:
            assert alone(backbone, request, **rules) == text


def test_generate_counts_neither_padding_nor_the_prefix(made, random_prefix):
    """Texts of different lengths in one batch, beams too: each as by itself."""
    from prefixtune.inference.config import GenerateConfig
    from prefixtune.inference.generate import generate_ids

    backbone = made("llama")
    prompts, prefixes = [[5, 6, 7, 8, 9, 10], [11], [0, 3]], [random_prefix(backbone, 4, 1).detach(), None, None]
    for beams in (1, 3):
        rules = {"frequency_penalty": 1.2, "repetition_penalty": 1.4, "presence_penalty": 0.5, "num_beams": beams}
        config = GenerateConfig(max_new_tokens=12, **rules)
        together = generate_ids(backbone, prompts, prefixes, config=config)
        apart = [
            generate_ids(backbone, [prompt], [prefix], config=config)[0]
            for prompt, prefix in zip(prompts, prefixes, strict=True)
        ]
        assert together == apart


@pytest.mark.parametrize(("temperature", "top_p", "min_p"), [(1.0, 1.0, 0.02), (0.6, 0.9, 0.2), (1.7, 0.5, 1.0)])
def test_what_is_drawn_within_min_p_is_what_transformers_leaves(temperature, top_p, min_p):
    scores = torch.randn(1, 12, generator=torch.Generator().manual_seed(3)) * 2
    left = TemperatureLogitsWarper(temperature)(None, scores)
    for warper in (TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)):
        left = warper(None, left)
    probabilities = left.softmax(-1)[0]
    count = 1000
    found = drawn(scores[0].tolist(), count, evenly=True, temperature=temperature, top_p=top_p, min_p=min_p)
    assert set(found) <= set(probabilities.nonzero().flatten().tolist())
    for token, share in enumerate(probabilities.tolist()):
        assert abs(found[token] - count * share) <= EvenNumbers.WITHIN
