"""A step by one call of compiled code against the model's own modules."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine_runs import ids
from prefixtune.attention.forward import forward_with_backend
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.native.norm import norm_kernel
from prefixtune.backbone.native.panels import panel_kernel
from prefixtune.backbone.prepack import prepack
from prefixtune.engine.attention import SlotAttention
from prefixtune.engine.config import EngineConfig
from prefixtune.engine.decoder_layers import find_layers
from prefixtune.engine.decoder_step import DecoderStep
from prefixtune.engine.engine import Engine
from prefixtune.engine.kv_cache import KVCache
from prefixtune.engine.native import AttentionKernel, load_kernel
from prefixtune.engine.native.decoder import DecoderKernel, decoder_kernel
from prefixtune.engine.request import Request, SamplingParams
from prefixtune.engine.shared_prefix import SharedPrefix
from prefixtune.engine.span import QuerySpan
from zoo import ZOO, make_model

MODELS = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True, "intermediate_size": 40, "num_key_value_heads": 1},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
}


@pytest.fixture(scope="module")
def attention() -> AttentionKernel:
    kernel = load_kernel(300.0)
    if kernel is None or panel_kernel(300.0) is None:
        pytest.skip("this machine gains nothing by panels, or compiles nothing")
    return kernel


@pytest.fixture(scope="module")
def kernel(attention: AttentionKernel) -> DecoderKernel:
    kernel = decoder_kernel().result(300.0)
    assert kernel is not None
    # A step is compared with the modules, whose norms must be compiled ones, too.
    assert norm_kernel().result(300.0) is not None
    return kernel


def made(name: str, tokenizer: Any, **changes: Any) -> Backbone:
    model = make_model(ZOO[name.partition(" ")[0]].name, tokenizer, **MODELS.get(name, {}), **changes)
    generator = torch.Generator().manual_seed(1)
    for parameter_name, parameter in model.named_parameters():
        # Those that begin as zeros and ones.
        if parameter_name.endswith("bias") or "norm" in parameter_name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return Backbone.from_model(model.to(torch.bfloat16), tokenizer, f"tiny-{name}")


def random_row(draw: random.Random, num_slots: int) -> list[QuerySpan]:
    """Decodes by slot, then pieces of prompts, in some of the slots."""
    slots = sorted(draw.sample(range(num_slots), draw.randint(1, num_slots)))
    starts = [draw.choice([0, 1, 3, 17, 63, 64, 70]) for _ in slots]
    counts = sorted(draw.choice([1, 1, 2, 15, 40]) for _ in slots)
    rows = zip(slots, starts, counts, strict=True)
    return [QuerySpan(slot, start, count, draw.choice([0, start])) for slot, start, count in rows]


def share_prefixes(spans: list[QuerySpan], backbone: Backbone, draw: random.Random) -> list[QuerySpan]:
    """The same, some of the prefixes outside the slots: of one length, the same one."""
    generator = torch.Generator().manual_seed(draw.randrange(1000))

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    shapes = backbone.geometry["decoder"]
    shared = {
        length: SharedPrefix(
            [(rand(s.num_kv_heads, length, s.key_dim), rand(s.num_kv_heads, length, s.value_dim)) for s in shapes]
        )
        for length in sorted({span.prefix_length for span in spans} - {0})
    }
    return [replace(span, shared=draw.choice([None, shared.get(span.prefix_length)])) for span in spans]


def make_step(backbone: Any, kernel: DecoderKernel, attention: AttentionKernel) -> DecoderStep | None:
    layers = find_layers(backbone)
    assert layers is not None
    return DecoderStep.make(backbone, layers, kernel, attention)


@pytest.mark.parametrize("name", MODELS)
def test_any_step_is_the_modules(name: str, tiny_tokenizer: Any, kernel: DecoderKernel, attention: AttentionKernel):
    backbone = prepack(made(name, tiny_tokenizer))
    step = make_step(backbone, kernel, attention)
    assert step is not None
    for seed in range(6):
        draw, generator = random.Random(f"{name} {seed}"), torch.Generator().manual_seed(seed)
        caches = [KVCache(backbone.geometry["decoder"], 5, 160, torch.bfloat16, backbone.device) for _ in range(3)]
        for cache in caches:
            cache.reserve(120)
            generator.manual_seed(seed)
            for buffer in (*cache.keys, *cache.values):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
        spans = share_prefixes(random_row(draw, 5), backbone, draw)
        positions = [span.start + index for span in spans for index in range(span.count)]
        tokens = [draw.randrange(60) for _ in positions]
        kept = torch.tensor(draw.choices(range(len(tokens)), k=draw.choice([1, 3, len(tokens) + 2])))
        with torch.inference_mode():
            found = step(tokens, positions, caches[0], spans, kept)
            plain = [
                forward_with_backend(
                    backbone.model,
                    backbone.layout,
                    torch.tensor([tokens]),
                    torch.tensor([positions]),
                    SlotAttention(
                        cache, [s for s in spans if s.count == 1], [s for s in spans if s.count > 1], kernel=each
                    ),
                    kept,
                )[0]
                for cache, each in ((caches[1], attention), (caches[2], None))
            ]
        assert found.dtype == torch.bfloat16
        # The same code in another frame, and torch's attention, which rounds weights and sums otherwise.
        for other, cache, near in ((plain[0], caches[1], 0.002), (plain[1], caches[2], 0.05)):
            assert (found.float() - other.float()).norm() <= near * other.float().norm()
            for one, another in zip(caches[0].keys + caches[0].values, cache.keys + cache.values, strict=True):
                assert (one.float() - another.float()).norm() <= near * another.float().norm()


def requests(backbone: Backbone, random_ids: Any, random_prefix: Any, count: int = 6) -> list[Request]:
    sampling = SamplingParams(max_new_tokens=20, min_new_tokens=20)
    return [
        Request(
            tuple(random_ids(3 + 9 * seed, seed)),
            random_prefix(backbone, 4 * seed, seed).detach() if seed % 2 else None,
            sampling,
        )
        for seed in range(count)
    ]


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_text_differs_from_the_plain_model_s_at_a_close_choice_only(
    name: str, tiny_tokenizer: Any, random_ids: Any, random_prefix: Any, kernel: DecoderKernel
):
    backbone = made(name, tiny_tokenizer)
    asked = requests(backbone, random_ids, random_prefix)
    engine = Engine(backbone, num_slots=4, prefill_tokens=16)
    texts = [one.run(asked) for one in (Engine(backbone, EngineConfig(prepack=False)), engine)]
    assert engine.runner._step is not None
    for request, one, other in zip(asked, *texts, strict=True):
        plain, found = ids(one[0]), ids(other[0])
        first = next((i for i, (a, b) in enumerate(zip(plain, found, strict=True)) if a != b), None)
        if first is None:
            continue
        with torch.inference_mode():
            row = torch.tensor([[*request.prompt, *plain[:first]]])
            logits = backbone.forward(row, prefixes=[request.prefix]).logits[0, -1].float()
        assert float((logits[plain[first]] - logits[found[first]]).abs()) <= 0.03 * float(logits.abs().max())


def test_a_text_is_the_same_alone_beside_others_and_with_any_number_of_threads(
    tiny_tokenizer: Any, random_ids: Any, random_prefix: Any, kernel: DecoderKernel
):
    backbone = made("llama", tiny_tokenizer)
    asked = requests(backbone, random_ids, random_prefix, 9)
    before = torch.get_num_threads()
    try:
        expected = [[ids(one[0]) for one in Engine(backbone).run([request])] for request in asked]
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            engine = Engine(backbone, num_slots=9)
            assert [[ids(one[0])] for one in engine.run(asked)] == expected
            assert engine.runner._step is not None
    finally:
        torch.set_num_threads(before)


def test_a_cancelled_text_leaves_the_others_as_they_are(
    tiny_tokenizer: Any, random_ids: Any, random_prefix: Any, kernel: DecoderKernel
):
    backbone = made("llama", tiny_tokenizer)
    asked = requests(backbone, random_ids, random_prefix)
    expected = [ids(one[0]) for one in Engine(backbone).run(asked)]
    engine = Engine(backbone, num_slots=3)
    for request in asked:
        engine.add(request)
    tokens: dict[str, list[int]] = {}
    for number in range(200):
        if number == 5:
            engine.cancel(asked[1].id)
        if not engine.busy:
            break
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(token.id for token in output.tokens)
    assert len(tokens[asked[1].id]) < 20
    assert [tokens[request.id] for request in asked if request is not asked[1]] == [expected[0], *expected[2:]]


def test_other_models_run_module_by_module(
    tiny_tokenizer: Any,
    tiny_backbone: Any,
    random_ids: Any,
    monkeypatch: pytest.MonkeyPatch,
    kernel: DecoderKernel,
    attention: AttentionKernel,
):
    assert find_layers(tiny_backbone("llama")) is None, "in float32"
    for name in ("gemma", "gpt2", "phi3", "mixtral"):
        assert find_layers(prepack(made(name, tiny_tokenizer))) is None, name
    assert find_layers(prepack(made("llama", tiny_tokenizer, hidden_act="gelu"))) is None
    hooked = prepack(made("llama", tiny_tokenizer))
    assert find_layers(hooked) is not None
    hooked.model.model.layers[1].register_forward_hook(lambda *_: None)
    assert find_layers(hooked) is None
    # One that computes something else is found out.
    changed = prepack(made("llama", tiny_tokenizer))
    changed.model.model.layers[2].mlp.down_proj.panels.panels[3] *= 2
    step = make_step(changed, kernel, attention)
    assert step is not None
    step._arguments.scale *= 1.5
    assert not step._agrees(changed, attention)
    # One that it fails on.
    with monkeypatch.context() as patched:
        patched.setattr(DecoderStep, "__call__", lambda *_: torch.ones(2) + torch.ones(3))
        assert make_step(prepack(made("llama", tiny_tokenizer)), kernel, attention) is None
    monkeypatch.setattr(DecoderStep, "_agrees", lambda *_: False)
    engine = Engine(made("llama", tiny_tokenizer))
    assert engine.run([Request(tuple(random_ids(5)), None, SamplingParams(max_new_tokens=3))])
    assert engine.runner._step is None
