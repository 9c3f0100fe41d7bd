"""Bodies of requests: what is accepted, ignored or refused, and how."""

from __future__ import annotations

import gc
import time
from typing import Any

import pytest

from prefixtune.server.api.openai_protocol import ChatRequest, CompletionRequest, parse_chat
from prefixtune.server.api.protocol import parse
from prefixtune.server.api.task_protocol import parse_task
from prefixtune.server.limits import Limits
from prefixtune.server.responses import ApiError

LIMITS = Limits(max_tokens=100, max_texts=6)
USER = [{"role": "user", "content": "hi"}]


def completion(**body: Any) -> Any:
    return parse(CompletionRequest, {"model": "m", "prompt": "text", **body}, LIMITS)


def chat(**body: Any) -> Any:
    return parse(ChatRequest, {"model": "m", "messages": USER, **body}, LIMITS)


def task(columns: tuple[str, ...] = ("name", "food"), **body: Any) -> Any:
    return parse_task(body, LIMITS, columns)


def refused(parse: Any, *arguments: Any, **body: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(*arguments, **body)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
    ],
)
def test_prompts(prompt: Any, prompts: Any) -> None:
    assert completion(prompt=prompt).prompts == prompts


@pytest.mark.parametrize("prompt", [None, "", [], ["a", 1], [[1], []], [True], [[1], "a"], {"a": 1}, 3, ["a", ""]])
def test_invalid_prompts(prompt: Any) -> None:
    assert refused(completion, prompt=prompt).param == "prompt"


def test_sampling_has_openais_defaults_and_takes_every_field() -> None:
    plain = completion().sampling(LIMITS)
    assert (plain.temperature, plain.top_p, plain.stop, plain.seed, plain.logprobs) == (1.0, 1.0, (), None, None)
    assert completion().length is None
    request = completion(
        max_tokens=7, min_tokens=2, temperature=0, top_p=0.5, top_k=3, seed=-1, stop=["a", "b"], n=2, logprobs=5,
        repetition_penalty=1.5, stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    sampling = request.sampling(LIMITS)
    assert (sampling.max_new_tokens, sampling.min_new_tokens, sampling.temperature) == (7, 2, 0.0)
    assert (sampling.top_p, sampling.top_k, sampling.seed, sampling.stop) == (0.5, 3, -1, ("a", "b"))
    assert (sampling.logprobs, sampling.repetition_penalty, request.n) == (5, 1.5, 2)
    assert request.stream
    assert request.include_usage
    assert request.length == 7
    assert completion(stop="end").sampling(LIMITS).stop == ("end",)
    # Clients send null for what is left out.
    assert completion(max_tokens=None, temperature=None, stop=None, n=None, stream=None, tools=None) == completion()


def test_vllms_top_k_for_all_tokens_and_openais_top_p_of_zero() -> None:
    assert completion(top_k=-1).sampling(LIMITS).top_k == 0
    assert 0 < completion(top_p=0).sampling(LIMITS).top_p < 1e-6


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1), ("max_tokens", 101), ("max_tokens", 1.5), ("max_tokens", True), ("max_tokens", "5"),
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", "hot"), ("temperature", True),
        ("repetition_penalty", 5e-324), ("temperature", 10**400), ("top_p", 10**400), ("max_tokens", 10**400),
        ("max_tokens", 1e300),
        ("top_p", -0.1), ("top_p", 1.1), ("top_k", -2), ("n", 0), ("n", 7), ("logprobs", 21), ("seed", 2**64),
        ("stop", [""]), ("stop", [1]), ("stop", ["a"] * 17), ("stop", "x" * 257), ("stream", 1), ("stream", "yes"),
        ("stream_options", {"include_usage": True}), ("repetition_penalty", 0), ("model", 3), ("model", ""),
        ("min_p", 1.1), ("min_p", -0.1), ("presence_penalty", 2.1), ("frequency_penalty", -2.1), ("echo", 1),
        ("logit_bias", {"a": 1}), ("logit_bias", {"5": 101}), ("logit_bias", {"5": True}), ("logit_bias", [5]),
        ("logit_bias", {str(token): 1 for token in range(1025)}), ("logit_bias", {"-1": 1}),
        ("response_format", {"type": "xml"}), ("response_format", "json"), ("response_format", {}),
        ("response_format", {"type": "json_object", "schema": {}}),
    ],
)  # fmt: skip
def test_values_out_of_range_name_their_field(field: str, value: Any) -> None:
    assert refused(completion, **{field: value}).param == field


def test_texts_are_bounded_over_all_prompts() -> None:
    assert completion(prompt=["a", "b", "c"], n=2).n == 2
    assert refused(completion, prompt=["a", "b", "c"], n=3).param == "n"
    assert refused(completion, min_tokens=5, max_tokens=4).param == "min_tokens"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]), ("tool_choice", "required"), ("best_of", 2),
        ("suffix", "x"), ("audio", {}), ("modalities", ["audio"]), ("reasoning_effort", "high"),
    ],
)  # fmt: skip
def test_unsupported_fields_are_refused_by_name(field: str, value: Any) -> None:
    error = refused(completion, **{field: value})
    assert error.param == field
    assert error.code == "unsupported_field"


def test_fields_that_change_nothing_are_ignored() -> None:
    neutral = {
        "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "logit_bias": {},
        "presence_penalty": 0, "frequency_penalty": 0.0, "best_of": 1, "suffix": "", "modalities": ["text"],
        "user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "parallel_tool_calls": True,
    }  # fmt: skip
    assert completion(**neutral).sampling(LIMITS) == completion().sampling(LIMITS)
    # In JSON false is not a number.
    assert refused(completion, presence_penalty=False).param == "presence_penalty"


def test_unknown_fields_get_a_suggestion() -> None:
    error = refused(completion, max_token=5)
    assert error.code == "unknown_field"
    assert error.param == "max_token"
    assert "Did you mean 'max_tokens'?" in error.message
    assert "'include_usage'" in refused(completion, stream=True, stream_options={"include_usages": True}).message
    # Fields of the other endpoint.
    assert refused(completion, messages=USER).param == "messages"
    assert refused(chat, prompt="a").param == "prompt"


def test_all_faults_fit_into_one_answer_with_the_number_of_the_others() -> None:
    names = [f"unknown{index}" for index in range(12)]
    message = refused(completion, **dict.fromkeys(names, 1)).message
    assert message.startswith("unknown fields 'unknown0', 'unknown1', ")
    assert message.count("Known: ") == 1
    assert message.endswith(" There are 2 more faults.")
    assert refused(completion, **dict.fromkeys(names[:11], 1)).message.endswith(" There is 1 more fault.")
    wrong = {"max_tokens": "x", "min_tokens": "x", "temperature": "x", "top_p": "x", "seed": "x", "stop": 1, "n": 0}
    long = {**wrong, "model": 1, "prompt": {}, "stream": "x", "x" * 500: 1, "logprobs": "x", "top_k": "x"}
    message = refused(completion, **long).message
    listed = sum(f"'{name}' is" in message for name in long)
    assert message.endswith(f" There are {len(long) - listed} more faults.")
    assert len(message) <= 1000


def test_all_unknown_fields_of_a_task_are_counted() -> None:
    body = {f"unknown{index}": 1 for index in range(31)}
    assert refused(task, **body).message.endswith(" There are 21 more faults.")
    assert refused(task, fields=body).message.endswith(" There are 21 more faults.")


@pytest.mark.parametrize("fields", [0, "", [], False])
def test_fields_that_are_no_object_are_one_fault(fields: Any) -> None:
    assert "none of the task's fields" not in refused(task, fields=fields).message
    # Later sentences begin with a capital letter.
    assert "The request has none of the task's fields." in refused(task, fields={}, max_tokens=0).message


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [("temperature", 1e308, "1e+308"), ("stream", 2.0, "2.0"), ("model", 1000.0, "1000.0"), ("top_k", 1e300, "1e+300")],
)
def test_a_wrong_value_is_shown_as_it_was_sent(field: str, value: Any, shown: str) -> None:
    assert f"'{field}' is {shown}, but" in refused(completion, **{field: value}).message


def test_a_hint_lists_ignored_fields_and_no_unsupported_ones() -> None:
    message = refused(completion, stream=True, stream_options={"foo": 1}).message
    assert "Known: include_obfuscation, include_usage." in message
    message = refused(completion, foo=1).message
    assert "user" in message
    assert "best_of" not in message


def test_a_part_that_is_no_text_part_is_answered_with_an_example() -> None:
    message = refused(chat, messages=[{"role": "user", "content": [5]}]).message
    assert 'only text parts are allowed, as in {"type": "text", "text": "..."}' in message


ITEMS = 100_000
USER_PART = {"type": "text", "text": "a"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": USER * ITEMS}, "messages"),
        ({"messages": [{}] * 2048}, "messages[0].role"),
        ({"messages": [0] * 2048}, "messages[0]"),
        ({"messages": USER * 250 + [0] * 1798}, "messages[250]"),
        ({"messages": [{"role": "user", "content": [{}] * ITEMS}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [USER_PART, *[0] * ITEMS]}]}, "messages[0].content[1]"),
        ({"messages": [{"role": "user", "content": [0] * 50}] * 2000}, "messages[0].content[0]"),
        ({"prompt": [[]] * ITEMS}, "prompt"),
        ({"prompt": [0.5] * ITEMS}, "prompt"),
        ({"prompt": ["a", *[0] * ITEMS]}, "prompt"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_the_faults_of_a_long_list_are_not_all_collected(body: dict[str, Any], param: str) -> None:
    parse_body = chat if "messages" in body else completion
    # The first use of a model builds it, and garbage of other tests is not counted.
    parse_body()
    gc.collect()
    started = time.process_time()
    error = refused(parse_body, **body)
    # To collect all of them takes a second, in which the process does nothing else.
    assert time.process_time() - started < 0.2
    assert error.param == param
    assert len(error.message) <= 1000


def test_penalties_and_biases_reach_the_engine() -> None:
    fields = {"min_p": 0.1, "presence_penalty": 0.5, "frequency_penalty": -1, "repetition_penalty": 1.5}
    params = completion(**fields, logit_bias={"5": -100, "007": 1.5}).sampling(LIMITS)
    assert fields == {name: getattr(params, name) for name in fields}
    assert params.logit_bias == {5: -100.0, 7: 1.5}


def test_response_formats() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    named = {"name": "x", "schema": schema, "strict": True, "description": "d"}
    assert completion(response_format={"type": "json_schema", "json_schema": named}).json_schema == schema
    assert chat(response_format={"type": "json_object"}).json_schema == {"type": "object"}
    assert completion(response_format={"type": "text"}).json_schema is None
    wrong = refused(chat, response_format={"type": "json_schema", "json_schema": {"name": "x"}})
    assert wrong.param == "response_format"
    assert '"schema": {...}' in wrong.message
    assert refused(chat, response_format={"type": "json_object"}, min_tokens=2).param == "min_tokens"


def test_echo_asks_for_the_prompts_logprobs_too() -> None:
    params = completion(echo=True, logprobs=3, max_tokens=0).sampling(LIMITS)
    assert (params.prompt_logprobs, params.logprobs, params.max_new_tokens) == (3, 3, 0)
    assert completion(echo=True).sampling(LIMITS).prompt_logprobs is None
    assert completion(logprobs=3).sampling(LIMITS).prompt_logprobs is None
    error = refused(chat, echo=True)
    assert (error.param, error.code) == ("echo", "unsupported_field")
    assert "/v1/completions" in error.message


def test_messages() -> None:
    request = chat(
        messages=[
            {"role": "developer", "content": "be brief", "name": "d"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None},
        ],
        max_completion_tokens=9,
        logprobs=True,
        top_logprobs=2,
    )
    assert request.conversation == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c"},
    ]
    assert request.sampling(LIMITS).max_new_tokens == 9
    assert request.sampling(LIMITS).logprobs == 2
    assert chat(logprobs=True).sampling(LIMITS).logprobs == 0
    assert chat(logprobs=False).sampling(LIMITS).logprobs is None


def test_a_chat_has_a_limited_number_of_messages_which_are_not_kept() -> None:
    body = {"model": "m", "messages": USER * 2048}
    request, conversation = parse_chat(body, LIMITS)
    assert (request.messages, conversation) == ([], USER * 2048)
    error = refused(chat, messages=USER * 2049)
    assert error.param == "messages"
    assert "must be a list of at least one message and at most 2,048" in error.message


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"), ("hi", "messages"), (["hi"], "messages[0]"),
        ([{"role": "tool", "content": "x"}], "messages[0].role"),
        ([*USER, {"role": "user"}], "messages[1].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0]"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], "messages[0].tool_calls"),
    ],
)  # fmt: skip
def test_invalid_messages(messages: Any, param: str) -> None:
    assert refused(chat, messages=messages).param == param


def test_whole_numbers_may_be_written_as_floats() -> None:
    assert completion(max_tokens=5.0, prompt=[1.0, 2], seed=-1.0) == completion(max_tokens=5, prompt=[1, 2], seed=-1)


def test_the_older_name_of_the_length_is_checked_as_well() -> None:
    assert chat(max_tokens=5, max_completion_tokens=9).sampling(LIMITS).max_new_tokens == 9
    assert refused(chat, max_tokens="x", max_completion_tokens=9).param == "max_tokens"
    assert refused(chat, max_completion_tokens=101).param == "max_completion_tokens"
    error = refused(chat, max_tokens=5, max_completion_tokens=2, min_tokens=3)
    assert error.message.endswith("more than max_completion_tokens (2).")
    assert "more than max_tokens (2)" in refused(chat, max_tokens=2, min_tokens=3).message


def test_top_logprobs_need_logprobs() -> None:
    assert refused(chat, top_logprobs=2).param == "top_logprobs"


def test_a_tasks_fields_may_be_beside_the_options() -> None:
    request = task(name="Aromi", food="soup", max_tokens=5, stream=True)
    assert request.record == {"name": "Aromi", "food": "soup"}
    assert request.sampling(LIMITS).max_new_tokens == 5
    assert request.stream
    # Greedy by default, unlike a completion.
    assert request.sampling(LIMITS).temperature == 0
    assert task(name="a", food="b", temperature=0.5).sampling(LIMITS).temperature == 0.5
    assert task(source="name is food").source == "name is food"


def test_columns_with_the_name_of_an_option_are_inside_fields() -> None:
    weather = ("temperature", "stop")
    request = task(weather, fields={"temperature": "9 C", "stop": "Oldbridge"}, temperature=0.7)
    assert request.record == {"temperature": "9 C", "stop": "Oldbridge"}
    assert request.sampling(LIMITS).temperature == 0.7


def test_wrong_bodies_of_tasks() -> None:
    assert "'food'" in refused(task, name="a", foood="b").message
    assert refused(task, name="a", source="b").param == "source"
    # A misspelled option is no field of the task.
    assert "both" not in refused(task, source="b", max_token=5).message
    assert refused(task).param == "name"
    assert refused(task, fields={"name": "a"}, food="b").param == "food"
    assert refused(task, fields=["a"]).param == "fields"
    assert refused(task, source=3).param == "source"
    assert all(refused(task, source="a", format_of=value).param == "format_of" for value in (0, False, [], {}))
    assert refused(task, (), mr="name[a]").param == "mr"
