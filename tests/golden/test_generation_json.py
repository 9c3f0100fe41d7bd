"""The tokens of texts that follow a JSON schema, by the engine and by `generate`: exactly what they were."""

import json
from pathlib import Path

import pytest

from prefixtune.engine import Request, SamplingParams, TorchEngine
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate_ids
from prefixtune.sampling.grammar import compile_json_schema
from tests.golden.test_generation import MODELS, check, describe, make_backbone, make_prefixes, make_prompts

SCHEMA = (
    '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": false}'
)


def compute():
    result = {}
    for name in MODELS:
        backbone = make_backbone(name)
        grammar = compile_json_schema(backbone, SCHEMA)
        requests = [
            Request(prompt, prefix, SamplingParams(max_new_tokens=30), grammar=grammar)
            for prompt, prefix in zip(make_prompts(), make_prefixes(backbone), strict=False)
        ]
        for number, (text,) in enumerate(TorchEngine(backbone, num_slots=2).run(requests)):
            result[f"{name} engine {number}"] = describe(text)
        config = GenerateConfig(max_new_tokens=30, response_schema=SCHEMA)
        prompts, prefixes = [request.prompt for request in requests], [request.prefix for request in requests]
        for number, ids in enumerate(generate_ids(backbone, prompts, prefixes, config=config)):
            result[f"{name} generate {number}"] = ids
    return result


def test_texts_that_follow_a_schema_are_what_they_were():
    pytest.importorskip("llguidance")
    golden = Path(__file__).with_name("generation_json.json")
    check(compute(), json.loads(golden.read_text(encoding="utf-8")))
