"""`generate` by the engine's compiled step, against transformers' loop; all settings work as they do there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.native.norm import norm_kernel
from prefixtune.backbone.native.panels import panel_kernel
from prefixtune.backbone.twin import make_twin
from prefixtune.data.encoding import default_format
from prefixtune.data.examples import Example
from prefixtune.engine.model_runner import ModelRunner
from prefixtune.engine.native import load_kernel
from prefixtune.engine.native.decoder import decoder_kernel
from prefixtune.evaluation.evaluate import evaluate
from prefixtune.inference import engine_runs
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.engine_runs import packed_backbone, texts_at_once
from prefixtune.inference.generate import generate, generate_ids
from prefixtune.inference.streaming import stream, stream_ids
from prefixtune.sampling.detokenizer import ids_until_stop
from prefixtune.sampling.penalties import penalize
from zoo import make_model

NEW = 16
CONFIG = GenerateConfig(max_new_tokens=NEW, min_new_tokens=NEW, batch_size=3)


@pytest.fixture(scope="module")
def is_compiled() -> bool:
    """Whether this machine gains by panels, and compiles; nothing of it comes in the middle of a test."""
    others: list[Future[Any]] = [decoder_kernel(), norm_kernel()]
    panel_kernel(300.0)
    load_kernel(300.0)
    wait(others, 300.0)
    return engine_runs._is_compiled(patient=True)


@pytest.fixture(autouse=True)
def engine_anywhere(is_compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere the engine runs the model's own layers: what it is asked for, and when, is the same."""
    if not is_compiled:
        monkeypatch.setattr(engine_runs, "_is_compiled", lambda patient: True)
        monkeypatch.setattr(engine_runs, "_pack", make_twin)


@pytest.fixture(scope="module")
def backbone(tiny_tokenizer: Any) -> Backbone:
    return in_bf16("llama", tiny_tokenizer)


def without_engine(backbone: Backbone) -> Backbone:
    """The same model, whose texts transformers' loop generates."""
    made = dataclasses.replace(backbone)
    made.__dict__["for_single_texts"] = made
    engine_runs._packed[made] = engine_runs.describe_weights(made), None
    return made


def in_bf16(name: str, tokenizer: Any, dtype: torch.dtype = torch.bfloat16) -> Backbone:
    return Backbone.from_model(make_model(name, tokenizer).to(dtype), tokenizer, f"tiny-{name}")


Asked = tuple[list[list[int]], list[Any]]


@pytest.fixture
def ask(random_ids: Any, random_prefix: Any) -> Callable[[Backbone], Asked]:
    """Seven prompts, some with a prefix."""

    def make(backbone: Backbone) -> Asked:
        prompts = [random_ids(length, seed) for seed, length in enumerate((7, 1, 30, 4, 12, 9, 2))]
        return prompts, [random_prefix(backbone, 3 * seed, seed).detach() if seed % 3 else None for seed in range(7)]

    return make


@pytest.fixture
def asked(ask: Callable[[Backbone], Asked], backbone: Backbone) -> Asked:
    return ask(backbone)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts were given to the engine, by call."""
    counts: list[int] = []
    original = engine_runs.run_in_engine

    def count(backbone: Any, texts: Any, *arguments: Any) -> Any:
        counts.append(len(texts))
        return original(backbone, texts, *arguments)

    monkeypatch.setattr("prefixtune.inference.generate.run_in_engine", count)
    return counts


PENALTIES = {"repetition_penalty": 1.3, "frequency_penalty": 0.2, "presence_penalty": 0.1}


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("settings", [{}, PENALTIES, {"ban_newlines": True}], ids=["greedy", "penalties", "newlines"])
def test_a_text_differs_from_transformers_loop_s_at_a_close_choice_only(
    name: str, settings: dict[str, Any], tiny_tokenizer: Any, ask: Callable[[Backbone], Asked], runs: list[int]
):
    backbone = in_bf16(name, tiny_tokenizer)
    config, asked = CONFIG.replace(**settings), ask(backbone)
    texts = [generate_ids(each, *asked, config=config) for each in (without_engine(backbone), backbone)]
    assert runs == [7]
    differing = 0
    for prompt, prefix, one, other in zip(*asked, *texts, strict=True):
        assert len(one) == len(other) == NEW
        first = next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
        if first is None:
            continue
        differing += 1
        with torch.inference_mode():
            scores = backbone.forward(torch.tensor([[*prompt, *one[:first]]]), prefixes=[prefix]).logits[0, -1].float()
        counts = torch.bincount(torch.tensor(one[:first], dtype=torch.long), minlength=len(scores))
        seen = counts > 0
        seen[prompt] = True
        scores = penalize(scores, config, seen, counts)
        assert float((scores[one[first]] - scores[other[first]]).abs()) <= 0.03 * float(scores.abs().max())
    assert differing < 7
    if settings == PENALTIES:
        assert generate_ids(backbone, *asked, config=CONFIG) != texts[1]


def test_a_text_is_the_same_alone_streamed_and_beside_others(backbone: Backbone, asked: Any, runs: list[int]):
    together = generate_ids(backbone, *asked, config=CONFIG)
    alone = [generate_ids(backbone, [p], [q], config=CONFIG)[0] for p, q in zip(*asked, strict=True)]
    assert alone == together
    streamed = ["".join(stream_ids(backbone, p, q, config=CONFIG)) for p, q in zip(*asked, strict=True)]
    assert streamed == [backbone.decode(ids).strip() for ids in together]
    assert runs == [7, *[1] * 14]
    pieces = list(stream(backbone, "a red fox", asked[1][1], config=CONFIG))
    assert "".join(pieces) == generate(backbone, ["a red fox"], asked[1][1], config=CONFIG)[0]


def test_ends_limits_and_stop_strings_are_each_text_s_own(backbone: Backbone, asked: Any, runs: list[int]):
    whole = generate_ids(backbone, *asked, config=CONFIG)
    limits = [1 + 2 * index for index in range(7)]
    assert generate_ids(backbone, *asked, config=CONFIG, new_tokens=limits) == [
        ids[:limit] for ids, limit in zip(whole, limits, strict=True)
    ]
    ends = [ids[5] for ids in whole]
    config = CONFIG.replace(min_new_tokens=0)
    cut = generate_ids(backbone, *asked, config=config, ends=[[end] for end in ends])
    free = generate_ids(backbone, *asked, config=config)
    for ids, expected, end in zip(cut, free, ends, strict=True):
        assert ids == (expected[: expected.index(end)] if end in expected else expected)
    text = backbone.decode(whole[2]).strip()
    stop = text[len(text) // 2 :][:3]
    assert generate_ids(backbone, *asked, config=CONFIG.replace(stop=(stop,))) == [
        ids_until_stop(backbone.decode, ids, (stop,)) for ids in whole
    ]
    assert runs == [7] * 5
    counts: list[int] = []
    generate_ids(backbone, *asked, config=CONFIG, on_batch=counts.append)
    assert counts == list(range(1, 8))


def test_seeds(backbone: Backbone, asked: Any, runs: list[int]):
    def sample(seed: int | None, **settings: Any) -> list[list[int]]:
        config = CONFIG.replace(temperature=1.0, seed=seed, **settings)
        return generate_ids(backbone, [asked[0][0]] * 3, [None] * 3, config=config)

    state = torch.get_rng_state()
    first = sample(3)
    assert torch.equal(torch.get_rng_state(), state), "torch's own random state is as it was"
    assert sample(3) == first != sample(4)
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(sample, [3, 4, 3, 3])) == [first, sample(4), first, first]
    assert len(set(map(tuple, first))) == 3, "each text draws its own"
    torch.manual_seed(5)
    free = sample(None)
    torch.manual_seed(5)
    assert sample(None) == free != sample(None)
    # The likeliest of few candidates.
    greedy = generate_ids(backbone, [asked[0][0]], [None], config=CONFIG)
    assert sample(3, top_k=1) == sample(4, top_p=1e-9) == greedy * 3
    assert all(runs)


def test_what_the_engine_does_not_do_is_transformers(backbone: Backbone, asked: Any, runs: list[int]):
    prompts, prefixes = asked
    for changes in ({"num_beams": 2}, {"cache": "static"}, {"prompt_lookup": 2}):
        generate_ids(backbone, prompts[:2], [None] * 2, config=GenerateConfig(max_new_tokens=2, **changes))
    infix = dataclasses.replace(prefixes[1], header={"placement": "infix"})
    generate_ids(backbone, prompts[:1], [infix], config=GenerateConfig(max_new_tokens=2))
    assert runs == []


def test_other_models_are_transformers(tiny_tokenizer: Any, asked: Any, runs: list[int]):
    for other in (in_bf16("gpt2", tiny_tokenizer), in_bf16("llama", tiny_tokenizer, torch.float32)):
        assert packed_backbone(other, NEW) is None
        assert other not in engine_runs._packed, "no matrix is copied for nothing"
        generate_ids(other, asked[0][:1], [None], config=GenerateConfig(max_new_tokens=2))
    assert runs == []


def test_hooks_have_their_effect(tiny_tokenizer: Any, asked: Any):
    backbone = in_bf16("llama", tiny_tokenizer)
    prompts, prefixes = asked
    before = generate_ids(backbone, prompts, prefixes, config=CONFIG)
    assert packed_backbone(backbone, NEW) is not None
    layer = backbone.model.model.layers[0]
    handle = layer.mlp.register_forward_hook(lambda module, inputs, output: 0 * output)
    assert packed_backbone(backbone, NEW) is None
    assert generate_ids(backbone, prompts, prefixes, config=CONFIG) != before
    handle.remove()
    assert generate_ids(backbone, prompts, prefixes, config=CONFIG) == before


def in_place(linear: torch.nn.Linear) -> None:
    with torch.no_grad():
        linear.weight.mul_(-3)


def by_data(linear: torch.nn.Linear) -> None:
    linear.weight.data.mul_(-3)


def another(linear: torch.nn.Linear) -> None:
    linear.weight = torch.nn.Parameter(linear.weight.detach() * -3, requires_grad=False)


def loaded(linear: torch.nn.Linear) -> None:
    linear.load_state_dict({"weight": linear.weight.detach() * -3}, assign=True)


@pytest.mark.parametrize("change", [in_place, by_data, another, loaded])
def test_changed_weights_have_their_effect(change: Any, tiny_tokenizer: Any, asked: Any, runs: list[int]):
    backbone, changed = (in_bf16("llama", tiny_tokenizer) for _ in range(2))
    before = generate_ids(backbone, *asked, config=CONFIG)
    for one in (backbone, changed):
        change(one.model.model.layers[0].mlp.down_proj)
    after = generate_ids(backbone, *asked, config=CONFIG)
    assert after != before
    assert after == generate_ids(changed, *asked, config=CONFIG)
    assert runs == [7, 7, 7]


def test_nothing_is_made_for_a_few_tokens_or_where_memory_is_short(tiny_tokenizer: Any, asked: Any, runs: list[int]):
    backbone = in_bf16("llama", tiny_tokenizer)
    few = GenerateConfig(max_new_tokens=2)
    generate_ids(backbone, asked[0][:1], [None], config=few)
    assert "for_single_texts" not in vars(backbone)
    assert backbone not in engine_runs._packed
    generate_ids(backbone, asked[0][:1], [None], config=CONFIG, may_pack=False)
    assert backbone not in engine_runs._packed
    generate_ids(backbone, asked[0][:1], [None], config=CONFIG)
    generate_ids(backbone, asked[0][:1], [None], config=few)
    assert runs == [1, 1], "once it is there, it is used"


def test_little_memory_keeps_one_copy(
    is_compiled: bool, tiny_tokenizer: Any, asked: Any, runs: list[int], monkeypatch: pytest.MonkeyPatch
):
    if not is_compiled:
        pytest.skip("this machine gains nothing by panels, or compiles nothing")
    monkeypatch.setattr(engine_runs, "_SHARE_OF_MEMORY", 0.0)
    generate_ids(in_bf16("llama", tiny_tokenizer), *asked, config=CONFIG)
    assert runs == []


def test_until_the_code_is_compiled_transformers_generates(
    tiny_tokenizer: Any, asked: Any, runs: list[int], monkeypatch: pytest.MonkeyPatch
):
    backbone, answers = in_bf16("llama", tiny_tokenizer), iter([False, False])
    monkeypatch.setattr(engine_runs, "_is_compiled", lambda patient: next(answers, True))
    counts: list[int] = []
    texts = generate_ids(backbone, *asked, config=CONFIG, on_batch=counts.append)
    assert runs == [1], "after two batches of three"
    assert counts == [3, 6, 7]
    assert [len(ids) for ids in texts] == [NEW] * 7


def test_a_text_that_fails_is_transformers(
    backbone: Backbone, asked: Any, runs: list[int], monkeypatch: pytest.MonkeyPatch
):
    packed_backbone(backbone, NEW)
    original, calls = ModelRunner.forward, []

    def fail(self: ModelRunner, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError("there is not enough")
        return original(self, *arguments)

    monkeypatch.setattr(ModelRunner, "forward", fail)
    found = generate_ids(backbone, *asked, config=CONFIG)
    assert runs == [7]
    assert [len(ids) for ids in found] == [NEW] * 7


def test_outputs_that_are_saved_in_between_come_in_larger_parts(backbone: Backbone, tiny_tokenizer: Any):
    assert texts_at_once(backbone, [None], CONFIG) == 24
    assert texts_at_once(backbone, [None], CONFIG.replace(num_beams=2)) == 3
    assert texts_at_once(in_bf16("gpt2", tiny_tokenizer), [None], CONFIG) == 3


def test_an_evaluation_decodes_as_generate_and_goes_on(backbone: Backbone, tmp_path: Path):
    examples = [Example(f"a red fox {number}", ("an owl",)) for number in range(7)]
    config = GenerateConfig(max_new_tokens=6, batch_size=2)
    counts: list[int] = []
    whole = evaluate(backbone, examples, config=config, resume_file=tmp_path / "decoded.jsonl", on_batch=counts.append)
    assert counts == list(range(1, 8))
    sources = [one.source for one in examples]
    assert list(whole.outputs) == generate(backbone, sources, config=config, text_format=default_format(backbone))
    again = evaluate(backbone, examples, config=config, resume_file=tmp_path / "decoded.jsonl", on_batch=counts.append)
    assert again.outputs == whole.outputs
    assert counts[7:] == [7], "nothing was decoded again"
