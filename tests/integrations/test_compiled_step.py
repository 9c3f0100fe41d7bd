"""The compiled step with int8 weights, which torchao makes, and under a JSON schema."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from prefixtune.attention.forward import forward_with_backend
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.prepack import Int8Linear, prepack
from prefixtune.backbone.quantization import quantize
from prefixtune.engine.attention import QuerySpan, SlotAttention
from prefixtune.engine.decoder_layers import find_layers
from prefixtune.engine.decoder_step import DecoderStep
from prefixtune.engine.kv_cache import KVCache
from prefixtune.engine.native import load_kernel
from prefixtune.engine.native.decoder import decoder_kernel
from prefixtune.inference import engine_runs
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.engine_runs import packed_backbone
from prefixtune.inference.generate import generate, generate_ids
from prefixtune.sampling.grammar import ANY_OBJECT
from zoo import make_model

TEXTS = [[5, 9, 11], [7], [12, 30, 8, 41]]


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    if not engine_runs._is_compiled(patient=True):
        pytest.skip("this machine gains nothing by panels, or compiles nothing")


def in_bf16(tokenizer: Any, quantized: str = "") -> Backbone:
    model = make_model("llama", tokenizer, attention_bias=True).to(torch.bfloat16)
    backbone = Backbone.from_model(model, tokenizer, "tiny-llama")
    if quantized:
        quantize(model, quantized)
    return backbone


def test_a_step_in_int8_is_the_modules_and_near_to_torchao_s(tiny_tokenizer: Any):
    backbone = in_bf16(tiny_tokenizer, "int8")
    packed = prepack(backbone)
    linears = [module for module in packed.model.modules() if type(module) is Int8Linear]
    assert len(linears) == 7 * len(packed.model.model.layers)
    assert all(linear.panels is not None for linear in linears)
    attention, kernel, layers = load_kernel(), decoder_kernel().result(), find_layers(packed)
    assert attention is not None
    assert kernel is not None
    assert layers is not None
    step = DecoderStep.make(packed, layers, kernel, attention)
    assert step is not None
    draw = random.Random(0)
    for count in (1, 3, 20, 70):
        ids, positions, spans = draw.choices(range(60), k=count), list(range(count)), [QuerySpan(0, 0, count, 0)]
        caches = [KVCache(packed.geometry["decoder"], 1, 80, torch.bfloat16, packed.device) for _ in range(2)]
        with torch.inference_mode():
            found = step(ids, positions, caches[0], spans, torch.arange(count)).float()
            backend = SlotAttention(caches[1], (), spans, kernel=attention)
            rows = torch.tensor([ids]), torch.tensor([positions])
            modules = forward_with_backend(packed.model, packed.layout, *rows, backend, None)[0].float()
            plain = backbone.model(input_ids=rows[0]).logits[0].float()
        assert (found - modules).norm() <= 0.002 * modules.norm()
        assert (found - plain).norm() <= 0.05 * plain.norm()


def test_generate_in_int8(tiny_tokenizer: Any):
    backbone = in_bf16(tiny_tokenizer, "int8")
    config = GenerateConfig(max_new_tokens=16, min_new_tokens=16)
    assert packed_backbone(backbone, 16) is not None
    together = generate_ids(backbone, TEXTS, [None] * 3, config=config)
    assert together == [generate_ids(backbone, [ids], [None], config=config)[0] for ids in TEXTS]


def test_four_bits_are_torchao_s(tiny_tokenizer: Any):
    backbone = in_bf16(tiny_tokenizer, "int4")
    assert packed_backbone(backbone, 16) is None
    assert len(generate_ids(backbone, TEXTS[:1], [None], config=GenerateConfig(max_new_tokens=16))) == 1


def test_a_schema_is_followed(tiny_tokenizer: Any):
    backbone = in_bf16(tiny_tokenizer)
    config = GenerateConfig(max_new_tokens=24, response_schema=ANY_OBJECT, temperature=1.0, seed=0)
    packed = packed_backbone(backbone, 24)
    assert packed is not None
    assert packed.vocab_size == backbone.vocab_size, "also where panels have further rows"
    assert all(text.startswith("{") for text in generate(backbone, ["a", "red fox"], None, config=config))
