"""The engine's running batch against generating one text at a time: the same tokens, whatever else runs beside."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine_runs import DECODERS_OF_THE_ZOO, ENCODER_DECODERS_OF_THE_ZOO, alone, ids
from patching import replace_everywhere
from prefixtune.attention.forward import forward_with_backend
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.prefixes import load_prefix, make_header
from prefixtune.engine.attention import StepAttention, attends_by_pages
from prefixtune.engine.config import EngineConfig
from prefixtune.engine.engine import TorchEngine
from prefixtune.engine.request import Request, SamplingParams
from prefixtune.errors import BackboneError, ConfigError, PrefixError, RequestError
from prefixtune.inference.prompts import newline_tokens
from prefixtune.prefix.prefix import Prefix
from prefixtune.sampling.detokenizer import Detokenizer
from tools.models_sweep import make_tiny

NEW = 10


@pytest.fixture
def llama(made):
    return made("llama")


def finish(engine):
    outputs = []
    while engine.busy:
        outputs += engine.step()
    return outputs


def by_text(outputs):
    found = {}
    for output in outputs:
        found.setdefault((output.request_id, output.index), []).extend(ids(output))
    return found


# --- the same tokens as alone ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("llama", "gpt2", "mistral", *DECODERS_OF_THE_ZOO),
        *("bart", "pegasus", "t5", "t5_gated", *ENCODER_DECODERS_OF_THE_ZOO),
    ],
)
def test_a_mixed_running_batch_is_each_text_alone(name, made, requests):
    backbone = made(name)
    asked = requests(backbone)
    expected = [alone(backbone, request) for request in asked]
    assert len({tuple(row) for row in expected}) > len(expected) / 2, "the requests must differ"
    # Fewer slots than texts, and prompts in pieces: texts join while others are being written.
    engine = TorchEngine(backbone, EngineConfig(num_slots=3, prefill_tokens=6))
    found = engine.run(asked)
    assert [ids(texts[0]) for texts in found] == expected
    assert {texts[0].finish_reason for texts in found} <= {"length", "stop"}


def by_brute_force(
    query,
    key,
    value,
    first_queries,
    first_keys,
    most_queries,
    most_keys,
    *,
    scale,
    window_size,
    enable_gqa,
    seqused_k,
    block_table,
):
    """What FlashAttention's function for many texts says that it computes, number by number."""
    assert enable_gqa
    assert {tensor.dtype for tensor in (first_queries, first_keys, seqused_k, block_table)} == {torch.int32}
    assert most_queries == int(first_queries.diff().max())
    assert most_keys == int(seqused_k.max())
    assert first_keys.diff().tolist() == seqused_k.tolist()
    out = torch.full((*query.shape[:2], value.shape[3]), float("nan"))
    for text, length in enumerate(seqused_k.tolist()):
        first, last = first_queries[text : text + 2].tolist()
        keys, values = (part[block_table[text].long()].flatten(0, 1)[:length] for part in (key, value))
        for row in range(first, last):
            position = length - (last - row)
            seen = [at for at in range(position + 1) if window_size[0] < 0 or position - at <= window_size[0]]
            for head in range(query.shape[1]):
                of_head = head // (query.shape[1] // key.shape[2])
                weights = (keys[seen, of_head] @ query[row, head] * scale).softmax(-1)
                out[row, head] = weights @ values[seen, of_head]
    return out


@pytest.mark.parametrize("name", ["llama", "mistral", "bart"])
def test_attention_by_pages_is_attention_text_by_text(name, made, requests, monkeypatch):
    """The road of a GPU, on a CPU: tables of pages, and places in them."""
    backbone = made(name)
    # In a window, a prefix would be hidden: these go text by text.
    bare = name in ("mistral", "bart")
    asked = [Request(r.prompt, None if bare else r.prefix, r.sampling) for r in requests(backbone)]
    expected = [alone(backbone, request) for request in asked]
    calls = 0

    def watch(*args, **kwargs):
        nonlocal calls
        calls += 1
        return by_brute_force(*args, **kwargs)

    monkeypatch.setattr("prefixtune.engine.model_runner.FLASH_PAGE", 4)
    monkeypatch.setattr("prefixtune.engine.model_runner.attends_by_pages", lambda _: True)
    monkeypatch.setattr("prefixtune.engine.attention.varlen_attention", lambda: watch)
    monkeypatch.setattr("prefixtune.engine.attention._PAGED_DTYPES", (torch.float32,))
    engine = TorchEngine(backbone, EngineConfig(num_slots=3, prefill_tokens=6))
    for cache in engine.runner.caches:
        for buffer in (*cache.keys, *cache.values):
            buffer.fill_(float("nan"))
    assert [ids(texts[0]) for texts in engine.run(asked)] == expected
    assert calls > NEW


@pytest.mark.parametrize(("capability", "by_pages"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_older_than_ampere_attends_text_by_text(capability, by_pages, monkeypatch):
    monkeypatch.setattr("prefixtune.engine.attention.varlen_attention", lambda: by_brute_force)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert attends_by_pages(torch.device("cuda:0")) == by_pages


@pytest.mark.parametrize(
    ("name", "long"),
    [("llama", 1), *((name, long) for name in ("llama", "mistral", "gemma2", "bart", "t5") for long in (8, 512))],
)
def test_texts_and_their_prefix_are_attended_to_together_or_alone(
    name, long, made, requests, random_prefix, random_ids, monkeypatch
):
    monkeypatch.setattr("prefixtune.engine.attention._LONG", long)
    monkeypatch.setattr("prefixtune.engine.model_runner.PAGE", 4)
    backbone = made(name)
    lengths = dict.fromkeys(backbone.geometry, 13)
    prefix = random_prefix(backbone, lengths, 5).detach()
    few = SamplingParams(max_new_tokens=NEW)
    own = [Request(tuple(random_ids(length, length)), prefix, few) for length in (3, 60, 9)]
    asked = [*own, *requests(backbone), Request(tuple(random_ids(14, 9)), None, few, n=3)]
    together, heads = 0, 0
    original = StepAttention.__post_init__

    def spy(step):
        nonlocal together, heads
        original(step)
        together, heads = together + len(step.together), heads + len(step.heads)

    monkeypatch.setattr(StepAttention, "__post_init__", spy)
    found = TorchEngine(backbone, EngineConfig(num_slots=16, prefill_tokens=6)).run(asked)
    for texts, request in zip(found, asked, strict=True):
        assert [ids(text) for text in texts] == [alone(backbone, request)] * request.n
    assert (together > 0) == (long > 1)
    assert (heads > 0) == (long < 512)


def test_a_prefix_is_in_the_pool_once(llama, random_prefix, random_ids, monkeypatch):
    """Whatever number of texts have it, and after the first one has ended."""
    prefix, few = random_prefix(llama, 70, 5).detach(), SamplingParams(max_new_tokens=NEW, min_new_tokens=NEW)
    engine = TorchEngine(llama, EngineConfig(num_slots=16))
    (cache,) = engine.runner.caches
    asked = [Request(tuple(random_ids(3, number)), prefix, few) for number in range(6)]
    expected = [alone(llama, request, min_new_tokens=NEW) for request in asked]
    outputs = []
    for request in asked:
        engine.add(request)
        outputs += engine.step()
    # Four whole pages once; each text's 6 last positions of the prefix, 3 of the prompt and 9 new ones for itself.
    assert len(cache.used) == 4 + 6 * 2
    assert max(cache.used.values()) == 6
    engine.cancel(asked[0].id)
    outputs += finish(engine)
    found = by_text(outputs)
    assert found[asked[0].id, 0] == expected[0][:6]
    assert [found[request.id, 0] for request in asked[1:]] == expected[1:]
    # The prompt of several texts, too: 70 + 29 positions are six whole pages.
    engine.add(Request(tuple(random_ids(30, 9)), prefix, few, n=4))
    engine.step()
    assert len(cache.used) == 6 + 4
    finish(engine)
    assert not cache.used


PREFIXES = {
    "decoder": ({}, {"decoder": 1}, {"decoder": 4}, {"decoder": 9}),
    "encoder-decoder": ({}, {"encoder": 4, "decoder": 3, "cross": 5}, {"decoder": 6}, {"encoder": 2, "cross": 7}),
}
one_request = st.fixed_dictionaries(
    {
        "prompt": st.sampled_from((1, 2, 5, 11, 19, 34)),
        "prefix": st.integers(0, 3),
        "new": st.integers(1, NEW),
        "n": st.sampled_from([1, 1, 1, 3]),
        "tenant": st.sampled_from(["a", "b", "c"]),
        "wait": st.integers(0, 3),
        "cancelled_after": st.one_of(st.none(), st.none(), st.integers(0, 12)),
    }
)


@pytest.mark.parametrize("name", ["llama", "mistral", "bart", "t5"])
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    asked=st.lists(one_request, min_size=1, max_size=9),
    num_slots=st.integers(1, 4),
    prefill_tokens=st.sampled_from([1, 3, 8, 64]),
    positions=st.sampled_from([64, 10_000]),
    page=st.sampled_from([4, 16]),
    long=st.sampled_from([4, 512]),
)
def test_any_schedule_gives_what_each_text_gives_alone(
    name, asked, num_slots, prefill_tokens, positions, page, long, made, random_ids, random_prefix
):
    backbone = made(name)
    each = sum(shape.size for shape in backbone.geometry["decoder"]) * backbone.dtype.itemsize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prefixtune.engine.model_runner.PAGE", page)
        patch.setattr("prefixtune.engine.attention._LONG", long)
        if backbone.kind == "decoder":
            # In little memory, texts wait for one another.
            patch.setattr("prefixtune.engine.model_runner.free_memory", lambda _: 2 * positions * each)
        engine = TorchEngine(backbone, EngineConfig(num_slots=num_slots, prefill_tokens=prefill_tokens))
    outputs, cancelled, expected = [], {}, {}
    prefixes = [
        random_prefix(backbone, lengths, number).detach() if lengths else None
        for number, lengths in enumerate(PREFIXES[backbone.kind])
    ]
    for number, one in enumerate(asked):
        for _ in range(one["wait"]):
            outputs += engine.step()
        prefix = prefixes[one["prefix"]]
        prompt, most = tuple(random_ids(one["prompt"], one["prompt"])), SamplingParams(max_new_tokens=one["new"])
        request = Request(prompt, prefix, most, n=one["n"], tenant=one["tenant"], id=f"r{number}")
        engine.add(request)
        expected |= {(request.id, index): alone(backbone, request) for index in range(one["n"])}
        if one["cancelled_after"] is not None:
            cancelled[request.id] = one["cancelled_after"]
    steps = 0
    while engine.busy:
        for request_id, after in cancelled.items():
            if after == steps:
                engine.cancel(request_id)
        outputs += engine.step()
        steps += 1
        assert steps < 1000
    ended = {(output.request_id, output.index): output.finish_reason for output in outputs if output.finish_reason}
    assert len(ended) == sum(output.finish_reason is not None for output in outputs), "every text ends once"
    found = by_text(outputs)
    assert ended.keys() == found.keys() == expected.keys()
    for key, reason in ended.items():
        assert found[key] == (expected[key][: len(found[key])] if reason == "cancelled" else expected[key])
    assert len(engine.snapshot().running) == engine.snapshot().waiting == 0
    for cache in engine.runner.caches:
        assert not cache.used
        assert not any(buffer.any() for buffer in (*cache.keys, *cache.values))


def test_bfloat16_differs_by_rounding_only(tiny_models, tiny_tokenizer, requests):
    backbone = Backbone.from_model(tiny_models("llama").to(torch.bfloat16), tiny_tokenizer, "tiny-bf16")
    asked = requests(backbone, logprobs=0)
    for request, (output,) in zip(asked, TorchEngine(backbone).run(asked), strict=True):
        if not output.tokens:
            continue
        reported = torch.tensor([token.logprob for token in output.tokens])
        expected = recomputed(backbone, request, ids(output))
        chosen = expected[torch.arange(len(reported)), ids(output)]
        # A bfloat16 has 8 bits, and the logits here go up to about 10.
        assert (reported - chosen).abs().max() < 0.3
        assert (expected.max(-1).values - chosen).max() < 0.3


# --- how tokens are chosen -------------------------------------------------------------------------------------------


@torch.no_grad()
def recomputed(backbone, request, written):
    """Log-probabilities at every place of a text, by running all of it at once with the prefix injected."""
    whole = torch.tensor([[*request.prompt, *written]])
    logits = backbone.forward(whole, prefixes=request.prefix).logits[0]
    start = len(request.prompt) - 1
    return logits[start : start + len(written)].float().log_softmax(-1)


def test_logprobs_are_those_of_the_whole_text_recomputed(llama, requests):
    asked = requests(llama, logprobs=3)
    for request, (output,) in zip(asked, TorchEngine(llama, EngineConfig(num_slots=3)).run(asked), strict=True):
        expected = recomputed(llama, request, ids(output))
        for token, row in zip(output.tokens, expected, strict=True):
            assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
            best = row.topk(3)
            assert [number for number, _ in token.top_logprobs] == best.indices.tolist()
            assert [value for _, value in token.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
            assert token.id == token.top_logprobs[0][0]


def test_a_prompts_logprobs_are_those_of_the_whole_text_recomputed(llama, requests, random_ids):
    asked = requests(llama, prompt_logprobs=3) + requests(llama, prompt_logprobs=0, max_new_tokens=0)
    asked += [
        *requests(llama),
        Request(tuple(random_ids(40, 1)), None, SamplingParams(prompt_logprobs=2, max_new_tokens=4), n=3),
    ]
    engine = TorchEngine(llama, EngineConfig(num_slots=3, prefill_tokens=6))
    engine.scheduler.max_prompt_logits = 3
    for request, outputs in zip(asked, engine.run(asked), strict=True):
        params = request.sampling
        for output in outputs:
            assert not params.max_new_tokens or ids(output) == alone(llama, request)
            assert params.max_new_tokens or (output.finish_reason, output.tokens) == ("length", ())
            if params.prompt_logprobs is None:
                assert output.prompt_tokens == ()
                continue
            first, *rest = output.prompt_tokens
            assert [token.id for token in output.prompt_tokens] == list(request.prompt)
            assert (first.logprob, first.top_logprobs) == (None, ())
            expected = recomputed(llama, replace(request, prompt=request.prompt[:1]), request.prompt[1:])
            for token, row in zip(rest, expected, strict=True):
                assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
                assert [id for id, _ in token.top_logprobs] == row.topk(params.prompt_logprobs).indices.tolist()


def test_prompts_with_logprobs_are_computed_in_pieces_of_bounded_size(llama, random_ids):
    engine = TorchEngine(llama)
    engine.scheduler.max_prompt_logits = 16
    sampling = SamplingParams(prompt_logprobs=1, max_new_tokens=0)
    for seed in range(3):
        engine.add(Request(tuple(random_ids(100, seed)), None, sampling))
    rows = []
    forward = engine.runner.forward

    def count(*scheduled):
        logits = forward(*scheduled)
        rows.append(len(logits))
        return logits

    engine.runner.forward = count
    finish(engine)
    assert max(rows) == 16
    assert sum(rows) >= 3 * 99


def test_texts_of_a_prompt_with_nan_fail_and_no_others(llama, random_ids, random_prefix):
    bad = broken(random_prefix(llama, 2, 5).detach(), float("nan"))
    sampling = SamplingParams(max_new_tokens=0, prompt_logprobs=1)
    asked = [Request(tuple(random_ids(6)), prefix, sampling, n=2) for prefix in (bad, None)]
    failed, good = TorchEngine(llama).run(asked)
    assert [output.finish_reason for output in failed] == ["error", "error"]
    assert [(output.finish_reason, len(output.prompt_tokens)) for output in good] == [("length", 6)] * 2


def test_the_longest_prompt_without_new_tokens(llama):
    engine = TorchEngine(llama, max_length=8)
    sampling = SamplingParams(prompt_logprobs=0, max_new_tokens=0)
    ((output,),) = engine.run([Request((1,) * 8, None, sampling)])
    assert len(output.prompt_tokens) == 8
    with pytest.raises(RequestError, match="9 \\(text\\)"):
        engine.add(Request((1,) * 9, None, sampling))


@pytest.fixture(scope="module")
def ending(made, random_ids):
    """A request whose text the model ends by itself."""
    backbone = made("llama")
    for seed in range(200):
        request = Request(tuple(random_ids(6, seed)), None, SamplingParams(max_new_tokens=NEW))
        if 1 < len(alone(backbone, request)) < NEW:
            return request
    raise AssertionError("no text of the tiny model ends")


@pytest.mark.parametrize(("name", "different"), [("llama", 11), ("bart", 10)])
def test_rules_give_what_generate_gives_with_them(name, different, made, ending, requests):
    backbone = made(name)
    rules = [
        ({}, {}),
        ({"min_new_tokens": NEW}, {"min_new_tokens": NEW}),
        ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
        ({"banned": tuple(newline_tokens(backbone))}, {"ban_newlines": True}),
    ]
    # All in one batch, beside texts without rules.
    asked, expected = [], []
    for ours, theirs in rules:
        for request in (ending, *requests(backbone)[:4]):
            asked.append(Request(request.prompt, request.prefix, SamplingParams(max_new_tokens=NEW, **ours)))
            expected.append(alone(backbone, request, **theirs))
    assert len({tuple(row) for row in expected}) >= different, "the rules must change something"
    outputs = [output for (output,) in TorchEngine(backbone).run(asked)]
    assert [ids(output) for output in outputs] == expected
    if name == "llama":
        # The end token ends a text and is left out.
        assert (outputs[0].finish_reason, len(outputs[5].tokens)) == ("stop", NEW)


@pytest.mark.parametrize("options", [{}, {"top_k": 20, "top_p": 0.9}])
def test_a_seed_gives_one_text_whatever_runs_beside(options, llama, requests):
    rules = {"temperature": 1.0, "seed": 11, **options}
    drawn = requests(llama, **rules)[0]
    drawn = Request(drawn.prompt, drawn.prefix, drawn.sampling, n=3)
    lonely = [ids(output) for output in TorchEngine(llama).run([drawn])[0]]
    again = Request(drawn.prompt, drawn.prefix, drawn.sampling, n=3)
    others = [*requests(llama), *requests(llama, temperature=1.3), again]
    mixed = TorchEngine(llama, EngineConfig(num_slots=4, prefill_tokens=5)).run(others)[-1]
    assert [ids(output) for output in mixed] == lonely
    assert len({tuple(row) for row in lonely}) == 3, "each of a request's texts draws by itself"
    other = Request(drawn.prompt, drawn.prefix, SamplingParams(max_new_tokens=NEW, **{**rules, "seed": 12}))
    assert ids(TorchEngine(llama).run([other])[0][0]) not in lonely


@pytest.mark.parametrize("new", [0, 1, NEW])
def test_texts_of_one_request_compute_its_prompt_once(new, llama, random_ids, random_prefix, monkeypatch):
    scored = None if new else 0
    rules = SamplingParams(max_new_tokens=new, min_new_tokens=new, temperature=1.0, seed=3, prompt_logprobs=scored)
    prefix = random_prefix(llama, 5, 5).detach()
    prompt = tuple(random_ids(40, 40))

    def computed(n):
        count = 0
        serve = forward_with_backend

        def watch(model, layout, input_ids, *rest):
            nonlocal count
            count += input_ids.shape[1]
            return serve(model, layout, input_ids, *rest)

        with monkeypatch.context() as patch:
            replace_everywhere(patch, forward_with_backend, watch)
            engine = TorchEngine(llama, EngineConfig(prefill_tokens=7))
            # Another request beside, so that pieces of the prompt come with running texts.
            others = [Request((1, 2), None, SamplingParams(max_new_tokens=30, min_new_tokens=30))]
            texts = engine.run([*others, Request(prompt, prefix, rules, n=n)])[1]
        return [ids(output) for output in texts], count

    (one,), once = computed(1)
    several, together = computed(4)
    assert several[0] == one
    assert len({tuple(text) for text in several}) == 4 or new < NEW
    # Of each further text: the prompt's last token and all that it writes but the last.
    assert together - once == 3 * max(1, new)


# --- several texts, leaving, failing ---------------------------------------------------------------------------------


def test_a_text_whose_token_cannot_be_decoded_fails_alone(llama, requests, monkeypatch):
    asked = requests(llama)
    add = Detokenizer.add
    bad = asked[0]

    def decode(self, *tokens):
        sequences = engine.scheduler.running
        if any(one.detokenizer is self and one.request is bad and one.num_new_tokens == 2 for one in sequences):
            raise ValueError("no such token")
        return add(self, *tokens)

    monkeypatch.setattr(Detokenizer, "add", decode)
    engine = TorchEngine(llama, EngineConfig(num_slots=3))
    found = engine.run(asked)
    assert found[0][0].error == "ValueError: no such token"
    for request, (output,) in zip(asked[1:], found[1:], strict=True):
        assert ids(output) == alone(llama, request)


def broken(prefix, value):
    layers = [(key.clone(), part.clone()) for key, part in prefix.layers["decoder"]]
    layers[1][0][0, 0] = value
    layers[1][1][0, 0] = value
    return Prefix({"decoder": tuple(layers)})


@pytest.mark.parametrize(("value", "num_slots"), [(float("nan"), 1), (float("inf"), 3), (3e38, 8)])
def test_a_broken_prefix_fails_its_own_request_alone(value, num_slots, llama, requests):
    asked = requests(llama)
    bad = Request(asked[0].prompt, broken(asked[0].prefix, value), asked[0].sampling)
    mixed = [asked[0], bad, *asked[1:]]
    found = TorchEngine(llama, EngineConfig(num_slots=num_slots)).run(mixed)
    assert found[1][0].finish_reason == "error"
    assert "finite" in found[1][0].error
    assert found[1][0].tokens == ()
    del found[1]
    # Also those that get the slot afterwards, behind whose masks its numbers would stand.
    assert [ids(output) for (output,) in found] == [alone(llama, request) for request in asked]


def test_a_broken_prefix_leaves_nothing_when_given_up_early(llama, requests):
    long, short, beside = (requests(llama)[n] for n in (1, 4, 6))
    engine = TorchEngine(llama, EngineConfig(num_slots=2, prefill_tokens=4))
    bad = Request(long.prompt, broken(long.prefix, float("nan")), long.sampling)
    engine.add(bad)
    engine.add(beside)
    outputs = engine.step()
    assert not outputs, "the broken prefix has not shown yet"
    engine.cancel(bad.id)
    engine.add(short)
    found = by_text(finish(engine))
    # It got the slot of the broken one, beside a longer text, so that the broken numbers would stand behind its mask.
    assert found[short.id, 0] == alone(llama, short)
    assert found[beside.id, 0] == alone(llama, beside)


def test_no_token_left_to_choose_fails_that_text_alone(llama, requests):
    one, two = requests(llama)[:2]
    everything = tuple(range(llama.model.get_input_embeddings().weight.shape[0]))
    none = Request(one.prompt, None, SamplingParams(banned=everything))
    found = TorchEngine(llama).run([none, two])
    assert (found[0][0].finish_reason, found[0][0].tokens) == ("error", ())
    assert ids(found[1][0]) == alone(llama, two)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_what_cannot_be_served_is_refused_before_any_work(llama, made, random_prefix, tiny_backbone):
    engine = TorchEngine(llama, EngineConfig(max_length=40))
    few = SamplingParams(max_new_tokens=3)
    last = Request((1,) * 20, random_prefix(llama, 5), SamplingParams(max_new_tokens=16))
    engine.add(last)
    wrong = [
        lambda: Request((1,) * 20, random_prefix(llama, 5), SamplingParams(max_new_tokens=17)),
        lambda: Request((1, 10_000), sampling=few),
        lambda: Request((1, -1), sampling=few),
        lambda: Request((1,), sampling=SamplingParams(max_new_tokens=3, banned=(10_000,))),
        lambda: Request((1,), id=last.id, sampling=few),
        lambda: Request(()),
        lambda: Request((1,), grammar={"type": "object"}),
        lambda: Request((1,), tenant=["a"]),
        lambda: Request((1,), n=0),
        lambda: Request((1,), "prefix.safetensors"),
        lambda: Request((1,), sampling=SamplingParams(temperature=-1.0, top_p=0.0, max_new_tokens=0)),
    ]
    for make in wrong:
        with pytest.raises(RequestError) as error:
            engine.add(make())
        assert error.value.hint
    with pytest.raises(BackboneError):
        engine.add(Request((1,), random_prefix(made("gpt2"), 2)))
    assert len(finish(engine)) == 16
    with pytest.raises(BackboneError):
        TorchEngine(tiny_backbone("bert"))
    with pytest.raises(ConfigError, match=r"num_slots.*prefill_tokens"):
        EngineConfig(num_slots=0, prefill_tokens=-1)


def test_a_run_is_all_or_nothing(llama, requests):
    first, second = requests(llama)[:2]
    engine = TorchEngine(llama)
    with pytest.raises(PrefixError):
        engine.run([first, Request((10_000,))])
    assert not engine.busy
    engine.add(first)
    # The outputs of what runs already would be lost.
    with pytest.raises(RequestError):
        engine.run([second])
    assert finish(engine)[-1].request_id == first.id
    assert ids(engine.run([second])[0][0]) == alone(llama, second)


def test_a_prefix_of_other_weights_is_refused(llama, tiny_backbone, random_prefix):
    other = tiny_backbone("llama", seed=1)
    prefix = Prefix(random_prefix(other, 3).layers, make_header(other))
    with pytest.raises(BackboneError, match="other weights"):
        TorchEngine(llama).add(Request((1,), prefix))
    few = SamplingParams(max_new_tokens=3)
    allowed = load_prefix(prefix, llama, allow_other_backbone=True)
    assert TorchEngine(llama).run([Request((1,), allowed, few)])
    assert TorchEngine(other).run([Request((1,), prefix, few)])


def test_a_model_on_several_devices_is_refused(tiny_models, tiny_tokenizer):
    backbone = Backbone.from_model(tiny_models("llama"), tiny_tokenizer, "spread")
    backbone.model.hf_device_map = {"model.embed_tokens": 0, "model.layers": 1, "lm_head": "cpu"}
    with pytest.raises(BackboneError, match="'spread' is on 2 devices") as error:
        TorchEngine(backbone)
    assert "`generate`" in error.value.hint
    # Where the CPU keeps what does not fit, all runs on one.
    backbone.model.hf_device_map = {"model.embed_tokens": 0, "model.norm": "cuda:0", "model.layers": "disk"}
    backbone.model.hf_device_map["lm_head"] = torch.device("cpu")
    assert TorchEngine(backbone).run([Request((1,), sampling=SamplingParams(max_new_tokens=2))])


def test_a_model_that_runs_a_layer_several_times_is_refused(tiny_tokenizer):
    backbone = Backbone.from_model(make_tiny("hrm_text", tiny_tokenizer), tiny_tokenizer, "tiny-looped")
    assert backbone.layout.repeats
    with pytest.raises(BackboneError, match="runs a layer several times in one pass"):
        TorchEngine(backbone)
