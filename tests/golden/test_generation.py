"""The tokens of forty mixed requests, by the engine and by `generate`: exactly what they were.

Tiny random models in float32, with weights so large that no two tokens are nearly as likely; log-probabilities are
compared to within 1e-4.
"""

import json
import random
from pathlib import Path

import pytest

from prefixtune.backbone.backbone import Backbone
from prefixtune.engine import EngineConfig, Request, SamplingParams, TorchEngine
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate, generate_ids, stream
from prefixtune.prefix.compose import concatenate
from random_prefixes import random_prefix
from zoo import NUM_BYTES, make_model, make_tokenizer

MODELS = ("llama", "bart")
"""Rotary positions with grouped heads; and an encoder-decoder, whose prefixes stand at three sites."""
NEW = 12
TOLERANCE = 1e-4
GOLDEN = Path(__file__).with_name("generation.json")


def make_backbone(name):
    tokenizer = make_tokenizer()
    return Backbone.from_model(make_model(name, tokenizer), tokenizer, f"tiny-{name}")


def make_prefix(backbone, length):
    return random_prefix(backbone, length, seed=length).detach()


def make_prefixes(backbone):
    """None, a short one, a long one, and one joined from two others."""
    short, long = make_prefix(backbone, 2), make_prefix(backbone, 40)
    joined = concatenate([make_prefix(backbone, 5), make_prefix(backbone, 9)], backbone.rotation)
    return [None, short, long, joined]


def make_prompts():
    draw = random.Random(7)
    lengths = (1, 3, 8, 20, 61, 2, 13, 34, 5, 27, 1, 9, 44, 16, 6, 11, 2, 30, 70, 4)
    return [tuple(draw.randrange(NUM_BYTES) for _ in range(length)) for length in lengths]


SAMPLING = (
    {},
    {"max_new_tokens": 5},
    {"stop": ("e", "q", "#")},
    {"logprobs": 2},
    {"min_new_tokens": 8, "repetition_penalty": 1.3},
    {"presence_penalty": 0.5, "frequency_penalty": 0.7},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "seed": 11},
    {"banned": (5, 17, 40), "end_ids": (9, 33), "logit_bias": {12: 3.0}},
    {"temperature": 1.0, "min_p": 0.05, "seed": 5, "logprobs": 0},
)


def make_requests(backbone):
    """Twenty, of three tenants; every seventh asks for two texts, and one for its prompt's log-probabilities."""
    prefixes = make_prefixes(backbone)
    requests = []
    for number, prompt in enumerate(make_prompts()):
        rules = {"max_new_tokens": NEW, **SAMPLING[number % len(SAMPLING)]}
        if number == 13 and backbone.kind == "decoder":
            rules["prompt_logprobs"] = 1
        requests.append(
            Request(
                prompt,
                prefixes[(number + number // 4) % 4],
                SamplingParams(**rules),
                n=2 if number % 7 == 6 else 1,
                tenant="abc"[number % 3],
                verbatim=number % 2 == 0,
                id=f"{number}",
            )
        )
    return requests


def describe(output):
    """What is compared of a text."""
    found = {
        "ids": [token.id for token in output.tokens],
        "text": output.text,
        "end": output.finish_reason,
        "prompt": [token.logprob for token in output.prompt_tokens],
    }
    if any(token.logprob is not None for token in output.tokens):
        found["logprobs"] = [token.logprob for token in output.tokens]
        found["top"] = [[id for id, _ in token.top_logprobs] for token in output.tokens]
    return found


def compute():
    result = {}
    for name in MODELS:
        backbone = make_backbone(name)
        prefixes = make_prefixes(backbone)
        requests = make_requests(backbone)
        # Fewer slots than texts, and prompts in pieces: they join while others are being written.
        engine = TorchEngine(backbone, EngineConfig(num_slots=6, prefill_tokens=16))
        for request, texts in zip(requests, engine.run(requests), strict=True):
            for index, text in enumerate(texts):
                result[f"{name} engine {request.id} {index}"] = describe(text)
        prompts = make_prompts()
        mixed = [prefixes[(number + number // 4) % 4] for number in range(len(prompts))]
        for way, config in {
            "greedy": GenerateConfig(max_new_tokens=NEW, batch_size=7),
            "penalized": GenerateConfig(max_new_tokens=NEW, repetition_penalty=1.2, min_new_tokens=6, batch_size=4),
            "beams": GenerateConfig(max_new_tokens=NEW, num_beams=3, batch_size=5),
        }.items():
            for number, ids in enumerate(generate_ids(backbone, prompts, mixed, config=config)):
                result[f"{name} {way} {number}"] = ids
        sources = [backbone.decode(prompt) for prompt in prompts[:8]]
        options = {"max_new_tokens": NEW, "stop": ("e", "q"), "ban_newlines": True}
        for number, text in enumerate(generate(backbone, sources, mixed[:8], **options)):
            result[f"{name} text {number}"] = text
        result[f"{name} streamed"] = "".join(stream(backbone, sources[3], mixed[3], **options))
    return result


def check(found, expected):
    assert sorted(found) == sorted(expected)
    for name, one in expected.items():
        other = found[name]
        if isinstance(one, dict):
            for part in ("prompt", "logprobs"):
                numbers = [[value for value in text.pop(part, []) if value is not None] for text in (one, other)]
                assert numbers[1] == pytest.approx(numbers[0], abs=TOLERANCE), (name, part)
        assert other == one, name


def test_forty_requests_are_what_they_were():
    check(compute(), json.loads(GOLDEN.read_text(encoding="utf-8")))
