"""Bodies of requests for texts: what they ask the engine for, and what is ignored."""

import pytest

from prefixtune.server.api.protocol import ChatRequest, CompletionRequest
from prefixtune.server.responses import ApiError
from prefixtune.server.settings import ServeConfig

LIMITS = ServeConfig(max_tokens=100, default_max_tokens=100, max_texts=6)
USER = [{"role": "user", "content": "hi"}]


def completion(**body):
    request = CompletionRequest.model_validate({"model": "m", "prompt": "text", **body})
    request.check(LIMITS)
    return request


def chat(**body):
    request = ChatRequest.model_validate({"model": "m", "messages": USER, **body})
    request.check(LIMITS)
    return request


def test_sampling_has_openais_defaults_and_takes_every_field():
    plain = completion().sampling(9)
    assert (plain.temperature, plain.top_p, plain.stop, plain.seed, plain.logprobs) == (1.0, 1.0, (), None, None)
    assert completion().length is None
    request = completion(
        max_tokens=7, min_tokens=2, temperature=0, top_p=0.5, top_k=3, seed=-1, stop=["a", "b"], n=2, logprobs=5,
        repetition_penalty=1.5, stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    sampling = request.sampling(9)
    assert (sampling.max_new_tokens, sampling.min_new_tokens, sampling.temperature) == (9, 2, 0.0)
    assert (sampling.top_p, sampling.top_k, sampling.seed, sampling.stop) == (0.5, 3, -1, ("a", "b"))
    assert (sampling.logprobs, sampling.repetition_penalty, request.n) == (5, 1.5, 2)
    assert (request.stream, request.include_usage, request.length) == (True, True, 7)
    assert completion(stop="end").sampling(9).stop == ("end",)
    # Clients send null for what is left out.
    assert completion(max_tokens=None, temperature=None, stop=None, n=None, stream=None, tools=None) == completion()


def test_fields_reach_the_engine():
    fields = {"min_p": 0.1, "presence_penalty": 0.5, "frequency_penalty": -1, "repetition_penalty": 1.5}
    params = completion(**fields, logit_bias={"5": -100, "007": 1.5}).sampling(9)
    assert fields == {name: getattr(params, name) for name in fields}
    assert params.logit_bias == {5: -100.0, 7: 1.5}
    params = completion(echo=True, logprobs=3, max_tokens=0).sampling(9)
    assert (params.prompt_logprobs, params.logprobs) == (3, 3)
    # vLLM's -1 is all tokens; OpenAI's 0 the likeliest alone.
    assert completion(top_k=-1).sampling(9).top_k == 0
    assert 0 < completion(top_p=0).sampling(9).top_p < 1e-6


def test_messages():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "be brief", "name": "d"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None},
    ]
    request = chat(messages=messages, max_completion_tokens=9, logprobs=True, top_logprobs=2)
    assert request.prompts[0] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c"},
    ]
    assert (request.length, request.sampling(9).logprobs) == (9, 2)
    assert [chat(logprobs=on).sampling(9).logprobs for on in (True, False)] == [0, None]


def test_what_changes_a_text_and_is_not_there_is_refused():
    neutral = {"best_of": 1, "suffix": "", "tools": [], "tool_choice": "auto", "verbosity": "medium", "audio": None}
    assert completion(**neutral) == completion()
    for name, value in (("suffix", "none"), ("tools", 1), ("best_of", 2), ("best_of", True), ("prediction", "auto")):
        with pytest.raises(ApiError) as caught:
            completion(**{name: value})
        assert (caught.value.param, caught.value.code) == (name, "unsupported_field")
    assert completion(seed=-(2**63)).sampling(9).seed == -(2**63)
