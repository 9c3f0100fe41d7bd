"""The engine with encoder-decoders: the same tokens as generating one text at a time, whatever else runs beside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine_runs import ENCODER_DECODERS_OF_THE_ZOO, alone, ids
from patching import replace_everywhere
from prefixtune.attention.forward import run_encoder
from prefixtune.attention.record import relative_bias
from prefixtune.backbone.backbone import Backbone
from prefixtune.data.batching import collate
from prefixtune.data.encoding import TokenizedExample
from prefixtune.engine.config import EngineConfig
from prefixtune.engine.engine import Engine
from prefixtune.engine.request import ContextLengthError, Request, SamplingParams
from prefixtune.errors import BackboneError
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate_ids
from prefixtune.prefix.prefix import Prefix
from zoo import make_model

NEW = 10
FAMILIES = ("bart", "pegasus", "t5", "t5_gated")
SITES = ({"encoder": 4, "decoder": 3, "cross": 5}, {"decoder": 6}, {"encoder": 2}, {"cross": 7}, {})


@pytest.fixture
def requests(random_ids: Any, random_prefix: Any) -> Callable[..., list[Request]]:
    """Nine requests: sources of 1 to 30 tokens, prefixes at all sites, at one of them, and none."""

    def make(backbone: Backbone, n: int = 1, **rules: Any) -> list[Request]:
        sampling = SamplingParams(**{"max_new_tokens": NEW, **rules})
        return [
            Request(
                tuple(random_ids(count, count)),
                random_prefix(backbone, SITES[number % len(SITES)], number).detach()
                if number % len(SITES) < 4
                else None,
                sampling,
                n=n,
            )
            for number, count in enumerate((7, 30, 2, 9, 1, 14, 3, 21, 5))
        ]

    return make


@pytest.mark.parametrize("name", [*FAMILIES, *ENCODER_DECODERS_OF_THE_ZOO])
def test_a_mixed_running_batch_is_each_text_alone(name: str, made: Any, requests: Any):
    backbone = made(name)
    asked = requests(backbone)
    expected = [alone(backbone, request) for request in asked]
    assert len({tuple(row) for row in expected}) > len(expected) / 2, "the requests must differ"
    engine = Engine(backbone, EngineConfig(num_slots=4, prefill_tokens=12))
    found = engine.run(asked)
    assert [ids(texts[0]) for texts in found] == expected


def test_a_long_text_goes_beyond_the_farthest_distance_of_a_bias(made: Any, requests: Any):
    backbone = made("t5")
    farthest = backbone.model.config.relative_attention_max_distance
    new = farthest + 20
    for request in requests(backbone, max_new_tokens=new, min_new_tokens=new)[:1]:
        (output,) = Engine(backbone).run([request])[0]
        assert len(output.tokens) == new
        assert ids(output) == alone(backbone, request, min_new_tokens=new)


def test_the_bias_at_each_distance_is_the_models_own(made: Any):
    backbone = made("t5")
    with torch.no_grad():
        found = relative_bias(backbone.model, backbone.layout, 40)
        own = backbone.model.get_decoder().block[0].layer[0].SelfAttention.compute_bias(40, 40)
    assert sorted(found) == [0, 1, 2]
    for distance in (0, 1, 17, 39):
        for bias in found.values():
            # All that are farther than it goes are alike.
            assert torch.equal(bias[:, min(distance, bias.shape[1] - 1)], own[0, :, 39, 39 - distance])


@pytest.mark.parametrize(("name", "num_slots"), [("bart", 28), ("t5", 2)])
def test_the_encoder_reads_a_request_of_many_texts_once(
    name: str, num_slots: int, made: Any, requests: Any, monkeypatch: pytest.MonkeyPatch
):
    backbone = made(name)
    # With two slots, texts of a request get theirs one after the other, as the first one is short.
    short = Request((5, 6), sampling=SamplingParams(max_new_tokens=2))
    asked = [short, *requests(backbone, n=3, temperature=1.0, seed=5, min_new_tokens=NEW)]
    lonely = [[ids(output) for output in Engine(backbone).run([Request(**_fields(r))])[0]] for r in asked]
    read = []
    encode = run_encoder

    def watch(model: Any, layout: Any, input_ids: torch.Tensor, prefix: Prefix | None) -> torch.Tensor:
        read.append(input_ids.shape[1])
        return encode(model, layout, input_ids, prefix)

    replace_everywhere(monkeypatch, run_encoder, watch)
    found = Engine(backbone, EngineConfig(num_slots=num_slots)).run(asked)
    assert [[ids(output) for output in texts] for texts in found] == lonely
    assert sorted(read) == sorted(len(request.prompt) for request in asked)


def _fields(request: Request) -> dict[str, Any]:
    return {
        "prompt": request.prompt,
        "prefix": request.prefix,
        "sampling": request.sampling,
        "n": request.n,
    }


@pytest.mark.parametrize("name", ["bart", "t5"])
@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    asked=st.lists(
        st.fixed_dictionaries(
            {
                "prompt": st.sampled_from((1, 2, 5, 11, 19)),
                "sites": st.integers(0, len(SITES) - 1),
                "new": st.integers(1, NEW),
                "n": st.sampled_from([1, 1, 2]),
                "wait": st.integers(0, 3),
                "cancelled_after": st.one_of(st.none(), st.none(), st.integers(0, 8)),
            }
        ),
        min_size=1,
        max_size=7,
    ),
    num_slots=st.integers(1, 4),
    prefill_tokens=st.sampled_from([1, 8, 64]),
)
def test_any_schedule_gives_what_each_text_gives_alone(
    name: str,
    asked: list[dict[str, Any]],
    num_slots: int,
    prefill_tokens: int,
    made: Any,
    random_ids: Any,
    random_prefix: Any,
):
    backbone = made(name)
    engine = Engine(backbone, EngineConfig(num_slots=num_slots, prefill_tokens=prefill_tokens))
    outputs, cancelled, expected = [], {}, {}
    for number, one in enumerate(asked):
        for _ in range(one["wait"]):
            outputs += engine.step()
        sites = SITES[one["sites"]]
        prefix = random_prefix(backbone, sites, one["sites"]).detach() if sites else None
        request = Request(
            tuple(random_ids(one["prompt"], one["prompt"])),
            prefix,
            SamplingParams(max_new_tokens=one["new"]),
            n=one["n"],
            id=f"r{number}",
        )
        engine.add(request)
        expected |= {(f"r{number}", index): alone(backbone, request) for index in range(one["n"])}
        if one["cancelled_after"] is not None:
            cancelled[f"r{number}"] = one["cancelled_after"]
    steps = 0
    while engine.busy:
        for request_id, after in cancelled.items():
            if after == steps:
                engine.cancel(request_id)
        outputs += engine.step()
        steps += 1
        assert steps < 1000
    found: dict[tuple[str, int], list[int]] = {}
    for output in outputs:
        found.setdefault((output.request_id, output.index), []).extend(ids(output))
    for output in outputs:
        if output.finish_reason == "cancelled":
            key = output.request_id, output.index
            assert found[key] == expected[key][: len(found[key])]
        elif output.finish_reason:
            assert found[output.request_id, output.index] == expected[output.request_id, output.index]
    assert sorted(found) == sorted(expected), "every text ends"
    for cache in engine.runner.caches:
        assert not cache.used_bytes
        assert not any(buffer.any() for buffer in (*cache.keys, *cache.values))


def test_rules_give_what_generate_gives_with_them(made: Any, requests: Any):
    backbone = made("bart")
    rules: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"min_new_tokens": NEW}, {"min_new_tokens": NEW}),
        ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
    ]
    asked, expected = [], []
    for ours, theirs in rules:
        for request in requests(backbone)[:5]:
            asked.append(Request(request.prompt, request.prefix, SamplingParams(max_new_tokens=NEW, **ours)))
            expected.append(alone(backbone, request, **theirs))
    assert [ids(output) for (output,) in Engine(backbone).run(asked)] == expected


def test_a_forced_first_token_comes_first(tiny_backbone: Any, requests: Any):
    backbone = tiny_backbone("mbart")
    backbone.model.generation_config.forced_bos_token_id = 7
    for request in requests(backbone)[:3]:
        (output,) = Engine(backbone).run([request])[0]
        assert ids(output)[0] == 7
        assert ids(output) == alone(backbone, request)


def test_bfloat16_runs(tiny_models: Any, tiny_tokenizer: Any, requests: Any):
    backbone = Backbone.from_model(tiny_models("t5").to(torch.bfloat16), tiny_tokenizer, "tiny-bf16")
    for texts in Engine(backbone).run(requests(backbone)):
        assert texts[0].finish_reason in ("stop", "length")


def test_too_long_a_source_or_text_is_refused(made: Any, random_ids: Any, random_prefix: Any):
    backbone = made("bart")
    limit = backbone.max_positions
    engine = Engine(backbone)
    with pytest.raises(ContextLengthError):
        engine.add(Request(tuple(random_ids(limit + 1)), None, SamplingParams(max_new_tokens=5)))
    with pytest.raises(ContextLengthError):
        engine.add(Request((1,), None, SamplingParams(max_new_tokens=limit + 1)))
    # A prefix takes none of the positions.
    prefix = random_prefix(backbone, {"encoder": 4, "decoder": 9, "cross": 5}).detach()
    request = Request(tuple(random_ids(limit)), prefix, SamplingParams(max_new_tokens=limit, min_new_tokens=limit))
    found = ids(engine.run([request])[0][0])
    assert (len(found), found) == (limit, alone(backbone, request, min_new_tokens=limit))


def test_a_source_that_cannot_be_read_fails_its_step_alone(made: Any, requests: Any, monkeypatch: pytest.MonkeyPatch):
    backbone = made("bart")
    asked = requests(backbone)
    expected = [alone(backbone, request) for request in asked]
    encode = run_encoder

    def watch(model: Any, layout: Any, input_ids: torch.Tensor, prefix: Prefix | None) -> torch.Tensor:
        if input_ids.shape[1] == 30:
            raise MemoryError("no room")
        return encode(model, layout, input_ids, prefix)

    replace_everywhere(monkeypatch, run_encoder, watch)
    found = [texts[0] for texts in Engine(backbone, EngineConfig(num_slots=3)).run(asked)]
    failed = [output for output in found if output.finish_reason == "error"]
    assert found[1] in failed
    assert len(failed) <= 3
    assert all("MemoryError" in output.error for output in failed)
    pairs = zip(found, expected, strict=True)
    assert all(ids(output) == row for output, row in pairs if output not in failed)


def test_what_cannot_write_side_by_side_is_refused(tiny_backbone: Any):
    with pytest.raises(BackboneError, match="is an encoder"):
        Engine(tiny_backbone("bert"))
    # Its decoder works positions out from the row.
    with pytest.raises(BackboneError, match="several texts in one row"):
        Engine(tiny_backbone("m2m_100"))
    # Its experts take so many tokens of a row, and what is beyond passes them by.
    with pytest.raises(BackboneError):
        Engine(tiny_backbone("switch_transformers"))


def test_texts_do_not_compete_for_experts(tiny_tokenizer: Any, random_ids: Any) -> None:
    """Switch Transformers' experts take so many tokens of a row, and what is beyond passes them by."""
    model = make_model("switch_transformers", tiny_tokenizer, expert_capacity=12, num_experts=2)
    backbone = Backbone.from_model(model, tiny_tokenizer, "tiny-switch")
    prompts, config = [random_ids(10, seed) for seed in range(12)], GenerateConfig(max_new_tokens=NEW)
    found = generate_ids(backbone, prompts, [None] * 12, config=config)
    assert found == [generate_ids(backbone, [prompt], [None], config=config)[0] for prompt in prompts]
    batch = collate(backbone, [TokenizedExample(tuple(prompt), ((3, 4),)) for prompt in prompts])
    assert (batch.packing, len(batch.input_ids)) == (None, len(prompts))
