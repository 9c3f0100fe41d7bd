"""What the server says to a hundred wrong requests: the status, the field at fault, the code, and how to go on.

The pieces of a message are the value that came, what is allowed, and what to do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from asgi_client import send
from prefixtune.server.auth import hash_key
from prefixtune.server.settings import KeyConfig

COMPLETIONS, CHATS, TASK = "/v1/completions", "/v1/chat/completions", "/v1/tasks/a"
USER = [{"role": "user", "content": "hi"}]
ROLES = ("system", "developer", "user", "assistant")
ERROR_TYPES = {401: "authentication_error", 403: "permission_error"}
FOREIGN = ("pydantic", "Input should", "validation error", "Traceback", "type=", "https://")
"""Words of a library, which say nothing to a caller."""


def completion(**fields: Any) -> tuple[str, dict[str, Any]]:
    return COMPLETIONS, {"model": "a", "prompt": "hi", **fields}


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return CHATS, {"model": "a", "messages": USER, **fields}


def task(body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return TASK, body


@dataclass(frozen=True)
class Wrong:
    """A wrong request and its answer.

    Attributes:
        name: What is wrong.
        request: Path and body; bytes are sent as they are.
        status: Of HTTP.
        param: The field at fault, without the path to it; of several faults one.
        code: Of the error; None: any.
        pieces: What the message has to contain; in place of one, what is as good, after a bar.
        also: What the message says of a second fault.
        headers: Of the request.
        keys: Whether the server has a key, `pt-me`, which may use the prefix `a` alone.
        method: Of HTTP.
    """

    name: str
    request: tuple[str, Any]
    status: int
    param: str | None
    code: str | None
    pieces: tuple[str, ...]
    also: tuple[str, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    keys: bool = False
    method: str = "POST"


# fmt: off
WRONG = [
    # wrong types
    Wrong("a length that is a text", completion(max_tokens="5"),
          400, "max_tokens", None,
          ("'max_tokens'", '"5"', "whole number", "0", "100")),
    Wrong("a length that is a fraction", completion(max_tokens=1.5),
          400, "max_tokens", None,
          ("'max_tokens'", "1.5", "whole number")),
    Wrong("a length that is a boolean", completion(max_tokens=True),
          400, "max_tokens", None,
          ("'max_tokens'", "true", "whole number")),
    Wrong("a temperature that is a text", completion(temperature="hot"),
          400, "temperature", None,
          ("'temperature'", '"hot"', "number", "0", "2")),
    Wrong("a temperature that is a boolean", chat(temperature=True),
          400, "temperature", None,
          ("'temperature'", "true", "number")),
    Wrong("a seed that is a list", completion(seed=[1]),
          400, "seed", None,
          ("'seed'", "[1]", "whole number")),
    Wrong("a stream that is a number", completion(stream=1),
          400, "stream", None,
          ("'stream'", "1", "true or false")),
    Wrong("logprobs of a chat that are a number", chat(logprobs=3),
          400, "logprobs", None,
          ("'logprobs'", "3", "true or false")),
    Wrong("logprobs of a completion that are a boolean", completion(logprobs=True),
          400, "logprobs", None,
          ("'logprobs'", "true", "whole number", "20")),
    Wrong("a model that is a number", (COMPLETIONS, {"model": 3, "prompt": "hi"}),
          400, "model", None,
          ("'model'", "/v1/models")),
    Wrong("no model", (COMPLETIONS, {"prompt": "hi"}),
          400, "model", None,
          ("'model'", "/v1/models")),
    Wrong("an empty model", (CHATS, {"model": "", "messages": USER}),
          400, "model", None,
          ("'model'", "/v1/models")),
    Wrong("no prompt", (COMPLETIONS, {"model": "a"}),
          400, "prompt", None,
          ("'prompt'", "text", "token ids")),
    Wrong("an empty prompt", completion(prompt=""),
          400, "prompt", None,
          ("'prompt'", "empty", "text")),
    Wrong("a prompt of texts and ids", completion(prompt=["a", 1]),
          400, "prompt", None,
          ("'prompt'", "list of texts", "token ids")),
    Wrong("a prompt that is an object", completion(prompt={"text": "hi"}),
          400, "prompt", None,
          ("'prompt'", "a text")),
    Wrong("stop strings that are numbers", completion(stop=[1]),
          400, "stop", None,
          ("'stop'", "text", "list of")),
    Wrong("an empty stop string", completion(stop=["a", ""]),
          400, "stop", None,
          ("'stop'", "text", "empty|of 1 to 256 characters")),
    Wrong("stream options that are a text", completion(stream=True, stream_options="usage"),
          400, "stream_options", None,
          ("'stream_options'", "object")),
    Wrong("stream options that are a boolean", completion(stream=True, stream_options=True),
          400, "stream_options", None,
          ("'stream_options' is true, but must be an object.",)),
    Wrong("a usage flag that is a text", completion(stream=True, stream_options={"include_usage": "yes"}),
          400, "include_usage", None,
          ("include_usage", '"yes"', "true or false")),
    # out of range
    Wrong("a length of zero", chat(max_tokens=0),
          400, "max_tokens", None,
          ("'max_tokens'", "0", "between 1 and 100")),
    Wrong("a length above the server's", completion(max_tokens=101),
          400, "max_tokens", None,
          ("'max_tokens'", "101", "between 0 and 100")),
    Wrong("a chat's length above the server's", chat(max_completion_tokens=101),
          400, "max_completion_tokens", None,
          ("'max_completion_tokens'", "101", "between 1 and 100")),
    Wrong("a negative length of a task", task({"name": "x", "max_tokens": -1}),
          400, "max_tokens", None,
          ("'max_tokens'", "-1", "between 1 and 100")),
    Wrong("a temperature that is too high", completion(temperature=2.5),
          400, "temperature", None,
          ("'temperature'", "2.5", "between 0 and 2")),
    Wrong("a negative top_p", completion(top_p=-1),
          400, "top_p", None,
          ("'top_p'", "-1", "between 0 and 1")),
    Wrong("a top_p above one", chat(top_p=1.5),
          400, "top_p", None,
          ("'top_p'", "1.5", "between 0 and 1")),
    Wrong("a top_k below vLLM's for all tokens", completion(top_k=-2),
          400, "top_k", None,
          ("'top_k'", "-2", "between -1 and 1000000")),
    Wrong("a repetition penalty of zero", completion(repetition_penalty=0),
          400, "repetition_penalty", None,
          ("'repetition_penalty'", "0", "between 0.01 and 10")),
    Wrong("a seed of 65 bits", completion(seed=2**64),
          400, "seed", None,
          ("'seed'", "18446744073709551616", "9223372036854775807")),
    Wrong("no text at all", completion(n=0),
          400, "n", None,
          ("'n'", "0", "between 1 and 6")),
    Wrong("more texts than allowed", completion(prompt=["a", "b", "c"], n=3),
          400, "n", None,
          ("3 prompts", "n = 3", "6 texts")),
    Wrong("too many logprobs", completion(logprobs=21),
          400, "logprobs", None,
          ("'logprobs'", "21", "between 0 and 20")),
    Wrong("a number without end", completion(temperature=10**400),
          400, "temperature", None,
          ("'temperature'", "10000", "between 0 and 2")),
    Wrong("too many stop strings", completion(stop=["a"] * 17),
          400, "stop", None,
          ("'stop'", "16", "256")),
    Wrong("a stop string that is too long", completion(stop="a" * 257),
          400, "stop", None,
          ("'stop'", "16", "256")),
    # fields that do not fit together
    Wrong("a least length above the length", completion(min_tokens=5, max_tokens=4),
          400, "min_tokens", None,
          ("min_tokens is 5", "max_tokens", "4")),
    Wrong("stream options without a stream", completion(stream_options={"include_usage": True}),
          400, "stream_options", None,
          ("'stream_options'", "stream to be true")),
    Wrong("top logprobs without logprobs", chat(top_logprobs=2),
          400, "top_logprobs", None,
          ("top_logprobs", "logprobs to be true")),
    # names
    Wrong("a misspelled field", completion(max_token=5),
          400, "max_token", "unknown_field",
          ("'max_token'", "Did you mean 'max_tokens'?")),
    Wrong("a misspelled field of a chat", chat(temprature=1),
          400, "temprature", "unknown_field",
          ("'temprature'", "Did you mean 'temperature'?")),
    Wrong("a misspelled field of a task", task({"nam": "x"}),
          400, "nam", "unknown_field",
          ("'nam'", "Did you mean 'name'?")),
    Wrong("a field of the other endpoint", completion(messages=USER),
          400, "messages", "unknown_field",
          ("unknown field 'messages'",)),
    Wrong("a misspelled stream option", completion(stream=True, stream_options={"include_usages": True}),
          400, "stream_options", "unknown_field",
          ("include_usages", "stream_options", "Did you mean 'include_usage'?")),
    Wrong("tools", chat(tools=[{"type": "function"}]),
          400, "tools", "unsupported_field",
          ("'tools' is not supported",)),
    Wrong("XML as the form of a reply", chat(response_format={"type": "xml"}),
          400, "response_format", None,
          ("'response_format'", "json_object", "json_schema")),
    Wrong("a presence penalty that is too high", completion(presence_penalty=3),
          400, "presence_penalty", None,
          ("'presence_penalty'", "3", "between -2", "2")),
    Wrong("a bias that is too high", completion(logit_bias={"5": 200}),
          400, "logit_bias", None,
          ("'logit_bias'", "token ids", "-100 and 100")),
    Wrong("a bias for a token that there is not", completion(logit_bias={"99999999": 1}),
          400, "logit_bias", None,
          ("no token 99999999",)),
    Wrong("a model that does not exist", (COMPLETIONS, {"model": "aa", "prompt": "hi"}),
          404, None, "model_not_found",
          ("no model 'aa'", "Did you mean 'a'?")),
    Wrong("a task of a model that does not exist", ("/v1/tasks/nobody", {"source": "x"}),
          404, None, "model_not_found",
          ("no model 'nobody'",)),
    # joined prefixes
    Wrong("an unknown part", completion(model="a+bb"),
          404, None, "model_not_found",
          ("no model 'bb'", "Did you mean 'b'?")),
    Wrong("an unknown part of a list", (CHATS, {"prefixes": ["a", "nobody"], "messages": USER}),
          404, None, "model_not_found",
          ("no model 'nobody'",)),
    Wrong("an unknown part of a task", ("/v1/tasks/a+nobody", {"source": "x"}),
          404, None, "model_not_found",
          ("no model 'nobody'",)),
    Wrong("a part that is named twice", completion(model="a+b+a"),
          400, "model", None,
          ("'a'", "twice", "once")),
    Wrong("an empty part", completion(model="a++b"),
          400, "model", None,
          ("empty", "one +")),
    Wrong("a + at the end", ("/v1/tasks/a+", {"source": "x"}),
          400, "model", None,
          ("empty",)),
    Wrong("the backbone as a part", completion(model="a+tiny"),
          400, "model", None,
          ("'tiny'", "bare backbone", "only prefixes")),
    Wrong("too many parts", completion(model="+".join("abcdefghi")),
          400, "model", "too_many_prefixes",
          ("9", "at most 8")),
    Wrong("a list of too many parts", completion(model="tiny", prefixes=list("abcdefghi")),
          400, "prefixes", "too_many_prefixes",
          ("'prefixes'", "9", "at most 8")),
    Wrong("an empty list of prefixes", completion(prefixes=[]),
          400, "prefixes", None,
          ("'prefixes'", "list", "at least one")),
    Wrong("prefixes without a list", (COMPLETIONS, {"prefixes": "a+b", "prompt": "hi"}),
          400, "prefixes", None,
          ("'prefixes'", "list"), also=("'model' is missing",)),
    Wrong("prefixes that are numbers", (COMPLETIONS, {"prefixes": [1, 2], "prompt": "hi"}),
          400, "prefixes", None,
          ("'prefixes'", "[1, 2]", "names")),
    Wrong("prefixes beside another model", completion(model="a", prefixes=["a", "b"]),
          400, "model", None,
          ("'a'", "'prefixes'", "'tiny'")),
    Wrong("prefixes of a task in the body", task({"source": "x", "prefixes": ["a", "b"]}),
          400, "prefixes", "unknown_field",
          ("'prefixes'",)),
    Wrong("a part of another key", completion(model="a+b"),
          403, None, "model_not_allowed",
          ("'me'", "'b'"), headers={"authorization": "Bearer pt-me"}, keys=True),
    # messages
    Wrong("no messages", (CHATS, {"model": "a"}),
          400, "messages", None,
          ("'messages'", "list")),
    Wrong("an empty list of messages", chat(messages=[]),
          400, "messages", None,
          ("'messages'", "at least one message|not empty")),
    Wrong("messages that are a text", chat(messages="hi"),
          400, "messages", None,
          ("'messages'", "list")),
    Wrong("a message that is a text", chat(messages=["hi"]),
          400, "messages[0]", None,
          ("messages[0]", "'role'", "'content'")),
    Wrong("a wrong role", chat(messages=[{"role": "tool", "content": "x"}]),
          400, "messages[0].role", None,
          ("messages[0].role", "tool", *ROLES)),
    Wrong("a message without a role", chat(messages=[{"content": "x"}]),
          400, "messages[0].role", None,
          ("messages[0].role", *ROLES)),
    Wrong("a message without content", chat(messages=[*USER, {"role": "user"}]),
          400, "messages[1].content", None,
          ("messages[1].content", "text")),
    Wrong("an image", chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
          400, "messages[0].content[0]", "unsupported_field",
          ("messages[0].content[0]", "only text")),
    Wrong("a tool call in a message",
          chat(messages=[{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]),
          400, "messages[0].tool_calls", "unsupported_field",
          ("messages[0].tool_calls", "only text")),
    Wrong("a chat that a prefix cannot read", chat(messages=USER * 2),
          400, "messages", "messages_not_carried",
          ("2 messages", "earlier_messages")),
    Wrong("a last message that is not the user's", chat(messages=[{"role": "assistant", "content": "x"}]),
          400, "messages", None,
          ("'assistant'", "the user's")),
    Wrong("a message of blanks", chat(messages=[{"role": "user", "content": " "}]),
          400, "messages", None,
          ("last message is empty", "text is needed")),
    # tasks
    Wrong("no field of the task", task({"max_tokens": 5}),
          400, "name", None,
          ("'name'", "'source'")),
    Wrong("a source and fields", task({"name": "x", "source": "y"}),
          400, "source", None,
          ("'source'", "fields", "not both")),
    Wrong("a source that is a number", task({"source": 3}),
          400, "source", None,
          ("'source'", "text")),
    Wrong("fields that are a list", task({"fields": ["x"]}),
          400, "fields", None,
          ("'fields'", "object")),
    Wrong("a field outside of the fields", task({"fields": {}, "name": "x"}),
          400, "name", None,
          ("'name'", "'fields'", "inside")),
    Wrong("a format of a number", task({"source": "x", "format_of": 3}),
          400, "format_of", None,
          ("'format_of'", "prefix")),
    Wrong("a field that is a list", task({"name": ["x"]}),
          400, None, None,
          ("name",)),
    # two at once
    Wrong("two values out of range", completion(temperature=3, top_p=2),
          400, "temperature", None,
          ("'temperature'", "3", "between 0 and 2"), also=("'top_p'", "2", "between 0 and 1")),
    Wrong("a misspelled field and a wrong value", completion(max_token=5, n=0),
          400, "max_token", "unknown_field",
          ("'max_token'", "'max_tokens'"), also=("'n'", "between 1 and 6")),
    Wrong("two wrong messages", chat(messages=["hi", {"role": "tool", "content": "x"}]),
          400, "messages[0]", None,
          ("messages[0]",), also=("messages[1].role", "tool")),
    Wrong("a wrong type and a missing field", (COMPLETIONS, {"model": "a", "max_tokens": "5"}),
          400, "prompt", None,
          ("'prompt'",), also=("'max_tokens'", '"5"')),
    Wrong("two unsupported fields", completion(tools=[1], best_of=2),
          400, "tools", "unsupported_field",
          ("'tools' is not supported",), also=("'best_of' is not supported",)),
    # bodies
    Wrong("no body", (COMPLETIONS, b""),
          400, None, "invalid_json",
          ("not JSON",)),
    Wrong("half a body", (COMPLETIONS, b'{"model": "a", "prompt"'),
          400, None, "invalid_json",
          ("not JSON", "line 1")),
    Wrong("a list as the body", (COMPLETIONS, b"[]"),
          400, None, "invalid_json",
          ("JSON object",)),
    Wrong("a text as the body", (CHATS, b'"hi"'),
          400, None, "invalid_json",
          ("JSON object",)),
    Wrong("NaN", (COMPLETIONS, b'{"model": "a", "prompt": "hi", "temperature": NaN}'),
          400, None, "invalid_json",
          ("not JSON", "NaN")),
    Wrong("infinity", (COMPLETIONS, b'{"model": "a", "prompt": "hi", "temperature": -Infinity}'),
          400, None, "invalid_json",
          ("not JSON", "Infinity")),
    Wrong("a number that is too large", (COMPLETIONS, b'{"model": "a", "prompt": "hi", "temperature": 1e999}'),
          400, None, "invalid_json",
          ("not JSON", "1e999|too large")),
    Wrong("thousands of digits", (COMPLETIONS, b'{"model": "a", "prompt": "hi", "seed": ' + b"1" * 5000 + b"}"),
          400, None, "invalid_json",
          ("not JSON",)),
    Wrong("the same key twice, the last one wrong",
          (COMPLETIONS, b'{"model": "a", "prompt": "hi", "max_tokens": 5, "max_tokens": 200}'),
          400, "max_tokens", None,
          ("'max_tokens'",)),
    Wrong("deep nesting", (COMPLETIONS, b'{"model": "a", "prompt": ' + b"[" * 80 + b"]" * 80 + b"}"),
          400, None, "invalid_json",
          ("nested", "72")),
    Wrong("very deep nesting", (COMPLETIONS, b"[" * 60_000),
          400, None, "invalid_json",
          ("nested", "72")),
    Wrong("bytes that are no text", (COMPLETIONS, b'{"model": "\xff"}'),
          400, None, "invalid_json",
          ("UTF-8|invalid unicode",)),
    Wrong("half a surrogate pair", (COMPLETIONS, b'{"model": "a", "prompt": "\\ud800"}'),
          400, None, "invalid_json",
          ("surrogate",)),
    Wrong("a wrong content type", completion(),
          415, None, "unsupported_media_type",
          ("text/plain", "application/json"), headers={"content-type": "text/plain"}),
    Wrong("no content type", completion(),
          415, None, "unsupported_media_type",
          ("content type", "application/json"), headers={"content-type": ""}),
    Wrong("a body that is too large", completion(prompt="a" * 70_000),
          413, None, "body_too_large",
          ("larger than", "65,536 bytes")),
    Wrong("a content length that is no number", completion(),
          400, None, None,
          ("content length", "number"), headers={"content-length": "many"}),
    # prompts that cannot work
    Wrong("a prompt that is too long", completion(prompt="a" * 600),
          400, "prompt", "context_length_exceeded",
          ("603 (text)", "512", "Shorten the prompt")),
    Wrong("a token that does not exist", completion(prompt=[1, 99_999]),
          400, "prompt", None,
          ("99999", "ids of the backbone's own tokenizer")),
    # paths, methods and keys
    Wrong("a path that does not exist", ("/v1/complete", {"model": "a", "prompt": "hi"}),
          404, None, "unknown_path",
          ("nothing at this path",)),
    Wrong("a method that is not allowed", (COMPLETIONS, None),
          405, None, "method_not_allowed",
          ("/v1/completions", "POST"), method="GET"),
    Wrong("another site's name", completion(),
          403, None, "host_not_allowed",
          ("localhost",), headers={"host": "evil.example"}),
    Wrong("a proxy without keys", completion(),
          403, None, "key_needed",
          ("proxy",), headers={"x-forwarded-for": "10.0.0.1"}),
    Wrong("an administrator without keys", ("/admin/reload", {}),
          403, None, "admin_key_needed",
          ("admin key",)),
    Wrong("no key", completion(),
          401, None, "invalid_api_key",
          ("API key", "Bearer"), keys=True),
    Wrong("a wrong key", completion(),
          401, None, "invalid_api_key",
          ("API key", "Bearer"), headers={"authorization": "Bearer pt-wrong"}, keys=True),
    Wrong("a model of another key", completion(model="b"),
          403, None, "model_not_allowed",
          ("'me'", "'b'"), headers={"authorization": "Bearer pt-me"}, keys=True),
    Wrong("a key that is not an admin's", ("/admin/reload", {}),
          403, None, "admin_key_needed",
          ("admin", "'me'"), headers={"authorization": "Bearer pt-me"}, keys=True),]
# fmt: on


def missing_pieces(pieces: Sequence[str], message: str) -> list[str]:
    return [piece for piece in pieces if not any(word in message for word in piece.split("|"))]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_the_answer_says_what_is_wrong_and_what_is_allowed(make_server: Callable[..., Any], wrong: Wrong) -> None:
    keys = {"me": KeyConfig(hash=hash_key("pt-me"), prefixes=("a",))} if wrong.keys else {}
    app, state = make_server(max_tokens=100, default_max_tokens=20, max_texts=6, max_body_kib=64, keys=keys)
    path, body = wrong.request
    response = asyncio.run(send(app, wrong.method, path, body, headers=dict(wrong.headers)))
    error = response.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert response.status == wrong.status, error
    if wrong.param is None or not wrong.also:
        assert wrong.param in (error["param"], *(error["param"] or "").split(".")), error
    else:
        assert error["param"] in error["message"]
    assert error["type"] == ERROR_TYPES.get(wrong.status, "invalid_request_error")
    assert wrong.code is None or wrong.also or error["code"] == wrong.code
    assert not missing_pieces((*wrong.pieces, *wrong.also), error["message"]), error["message"]
    assert not [word for word in FOREIGN if word in error["message"]], error["message"]
    assert error["message"].endswith((".", "?"))
    # Nothing of it was computed, and nothing is held.
    assert (state.worker.snapshot().steps, state.admission.texts, state.pending_bytes.used) == (0, 0, 0)
