"""A real server, called as people call it: OpenAI's own client, its types and exceptions, many connections at once."""

import json
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from openai.types import Completion, CompletionUsage, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.shared import ErrorObject
from pydantic import BaseModel

from live_server import MODEL, fill_folder, generate_alone, serve
from oracles import outputs_of
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.data import TASKS
from prefixtune.data.benchmarks import linearize_e2e
from prefixtune.data.encoding import encode_prompts
from prefixtune.inference.generate import generate
from prefixtune.prefix.text_format import read_text_format

FORMAT = {"prompt": " {source} {separator}", "target": " {target} "}
RULES = {
    "me": f'prefixes = ["[!y]*", "{MODEL}"]\nmetrics = true',
    "busy": "concurrent = 1",
    "rare": "requests_per_minute = 1",
}
USER = [{"role": "user", "content": "Aromi: soup"}]
WITH_USAGE = {"stream": True, "stream_options": {"include_usage": True}}
GREEDY = {"model": "mine", "max_tokens": 12, "temperature": 0}
LONG = {"model": "mine", "prompt": "a", "max_tokens": 60, "n": 8, "temperature": 0}
MR = "name[The Vaults], eatType[pub], area[riverside]"


@pytest.fixture(scope="module")
def backbone(folder):
    framed = {"prompt": "{source}{separator}", "target": "<<{target}>>", "source": "text"}
    prefixes = {
        "pubs": {"length": 3, "task": "e2e", "text_format": {**FORMAT, "source": ""}},
        "facts": {"length": 4, "task": "webnlg", "text_format": {**FORMAT, "source": ""}},
        "mine": {"length": 5, "task": "records", "text_format": {**FORMAT, "source": "{name}: {food}"}},
        "worded": {"task": "records", "text_format": framed},
        # Of those whose files store no text format, prompts and chats go as they do to the bare backbone.
        "plain": {},
        "yours": {},
    }
    made = fill_folder(folder, prefixes, "max_texts = 64\nmax_queue = 400", RULES)
    (folder / "prefixes" / "broken.safetensors").write_bytes(b"nothing of the kind")
    return made


@pytest.fixture(scope="module")
def server(folder, backbone):
    server = serve(folder)
    server.key = "pt-me"
    yield server
    assert server.stop() == 0
    assert not [line for line in server.lines if line["level"] == "error"]


def client_with(server, key, **options):
    return openai.OpenAI(**{"base_url": f"{server.url}/v1", "api_key": f"pt-{key}", "max_retries": 0, **options})


@pytest.fixture(scope="module")
def client(server):
    with client_with(server, "me") as client:
        yield client


def events(text):
    *parts, last = [part for part in text.split("\n\n") if part]
    assert last == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def target(backbone, folder, source, name, length):
    """What `prefixtune generate` gives for a source, greedily."""
    prefix = load_prefix(folder / "prefixes" / f"{name}.safetensors", backbone)
    defaults = {name: TASKS[prefix.header["task"]].decoding.get(name) for name in ("min_new_tokens", "ban_newlines")}
    options = {name: value for name, value in defaults.items() if value is not None}
    (written,) = generate(backbone, [source], prefix, max_new_tokens=length, **options)
    return written


# --- OpenAI's client --------------------------------------------------------------------------------------------------


def test_a_completion_is_the_text_of_the_engine_alone(client, backbone, folder):
    prompt, ids = "Two trains to Oldbridge", backbone.encode("Two trains to Oldbridge")
    # Of a prefix without a text format, of the bare backbone, and of ids, the prompt is what the engine gets.
    for name, given in (("plain", prompt), (MODEL, prompt), ("pubs", ids)):
        answer = client.completions.create(model=name, prompt=given, max_tokens=20, temperature=0)
        prefix = None if name == MODEL else name
        assert answer.choices[0].text == generate_alone(backbone, folder / "prefixes", ids, prefix, max_new_tokens=20)
        assert answer.choices[0].finish_reason == "length"
        # The prefix's positions are not counted.
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 20)
    texts = client.completions.create(model="pubs", prompt=[prompt, "x"], max_tokens=20, temperature=0, n=2)
    assert [choice.index for choice in texts.choices] == [0, 1, 2, 3]
    expected = [target(backbone, folder, source, "pubs", 20) for source in (prompt, prompt, "x", "x")]
    assert [choice.text for choice in texts.choices] == expected


def test_the_same_source_gives_the_same_text_everywhere(client, server, backbone, folder):
    source = "Aromi: soup"
    for name in ("pubs", "facts", "mine", "worded"):
        expected = target(backbone, folder, source, name, 24)
        options = {"model": name, "max_tokens": 24, "temperature": 0}
        messages = [{"role": "user", "content": source}]
        assert server.post(f"/v1/tasks/{name}", {"source": source, "max_tokens": 24})[1]["output"] == expected
        assert client.completions.create(prompt=source, **options).choices[0].text == expected
        assert client.chat.completions.create(messages=messages, **options).choices[0].message.content == expected
        pieces = client.completions.create(prompt=source, stream=True, **options)
        assert "".join(piece.choices[0].text for piece in pieces) == expected
        chunks = client.chat.completions.create(messages=messages, stream=True, **options)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_a_chat_uses_the_backbones_template(client, backbone, folder):
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "Hello!"}]
    options = {"model": "plain", "messages": messages, "max_tokens": 30, "temperature": 0}
    whole = client.chat.completions.create(**options)
    prompt = "[system]be kind</s>[user]Hello!</s>[assistant]"
    text = generate_alone(backbone, folder / "prefixes", backbone.encode(prompt), "plain", max_new_tokens=30)
    assert whole.choices[0].message.content == text
    assert whole.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == "length"
    with pytest.raises(openai.BadRequestError, match="the assistant cannot begin"):
        client.chat.completions.create(**{**options, "messages": [{"role": "assistant", "content": "x"}]})


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_a_tasks_output_is_that_of_generate(server, backbone, folder):
    prefix = load_prefix(folder / "prefixes" / "pubs.safetensors", backbone)
    greedy = {"max_new_tokens": 60, "min_new_tokens": 5, "ban_newlines": True}
    (expected,) = generate(backbone, [linearize_e2e(MR)], prefix, **greedy)
    answer = server.post("/v1/tasks/pubs", {"mr": MR, "max_tokens": 60})[1]
    assert (answer["output"], answer["source"]) == (expected, linearize_e2e(MR))
    # The task's own length by default.
    assert server.post("/v1/tasks/pubs", {"mr": MR})[1]["usage"]["completion_tokens"] == 100
    # The bare backbone on the very same text.
    (bare,) = generate(backbone, [linearize_e2e(MR)], None, text_format=read_text_format(prefix.header), **greedy)
    other = server.post(f"/v1/tasks/{MODEL}", {"mr": MR, "format_of": "pubs", "max_tokens": 60})[1]
    assert other["output"] == bare != expected


def test_tasks_stream_and_take_records_and_triples(server, backbone, folder):
    body = {"name": "Aromi", "food": "soup", "max_tokens": 30}
    whole = server.post("/v1/tasks/mine", body)[1]
    assert whole["source"] == "Aromi: soup"
    streamed = events(server.post("/v1/tasks/mine", {**body, "stream": True})[1])
    assert "".join(event.get("delta", "") for event in streamed) == whole["output"]
    assert (streamed[-1]["output"], streamed[-1]["usage"]) == (whole["output"], whole["usage"])
    # Words around the target are taken off the whole output: a stream gives it at once.
    prefix = load_prefix(folder / "prefixes" / "worded.safetensors", backbone)
    (expected,) = generate(backbone, ["a text"], prefix, max_new_tokens=20)
    streamed = events(server.post("/v1/tasks/worded", {"text": "a text", "max_tokens": 20, "stream": True})[1])
    assert [event["output"] for event in streamed] == [expected]


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_responses_have_security_headers_and_a_request_id(server):
    for path in ("/v1/models", "/", "/nothing"):
        headers = {name.lower(): value for name, value in server.get(path)[2].items()}
        assert (headers["x-content-type-options"], headers["x-frame-options"]) == ("nosniff", "DENY")
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-request-id"]
        assert headers.keys().isdisjoint({"server", "access-control-allow-origin"})
    assert [server.get(f"/docs/{name}")[0] for name in ("nothing.js", "..%2Fcore.py")] == [404, 404]


def test_metrics_can_be_read_by_prometheus(server):
    # The first request reads the prefix, the next ones find it; and somebody asks for what is not there.
    server.post("/v1/completions", {"model": "facts", "prompt": "abc", "max_tokens": 2, "temperature": 0})
    assert server.get("/nowhere")[0] == 404
    before = server.metric("prefixtune_new_tokens_total", prefix="facts")
    texts = server.metric("prefixtune_texts_total", prefix="facts", finished="length")
    server.post("/v1/completions", {"model": "facts", "prompt": "abc", "max_tokens": 11, "n": 2, "temperature": 0})
    assert server.metric("prefixtune_new_tokens_total", prefix="facts") == before + 22
    assert server.metric("prefixtune_texts_total", prefix="facts", finished="length") == texts + 2
    assert (server.metric("prefixtune_slots"), server.metric("prefixtune_refused_prefixes")) == (32, 1)
    for name in ("prefix_cache_hits_total", "first_token_seconds_count", "step_texts_total", "steps_total"):
        assert server.metric(f"prefixtune_{name}") > 0
    assert server.metric("prefixtune_requests_total", route="unknown") >= 1


def test_the_log_is_json_and_holds_no_prompts(server):
    server.post("/v1/completions", {"model": "pubs", "prompt": "a most secret word", "max_tokens": 3})

    def completions():
        return [line for line in server.lines if line["event"] == "request" and line["path"] == "/v1/completions"]

    server.until(lambda: completions() and completions()[-1]["prompt_tokens"] == len(" a most secret word ") + 1)
    logged = completions()
    assert {"id", "key", "model", "status", "seconds", "prompt_tokens", "completion_tokens"} <= set(logged[-1])
    assert "secret" not in json.dumps(server.lines)
    assert "broken is not served" in "".join(server.errors)


# --- in the client's types --------------------------------------------------------------------------------------------


def parsed(kind, value, *, extra=()):
    """A value as one of the client's types: nothing is missing, of another type, or unknown to it."""
    result = kind.model_validate_json(json.dumps(value), strict=True)
    check_known(result, extra)
    return result


def check_known(value, extra):
    if isinstance(value, list):
        for item in value:
            check_known(item, extra)
    elif isinstance(value, BaseModel):
        assert (value.model_extra or {}).keys() <= set(extra)
        for name in type(value).model_fields:
            check_known(getattr(value, name), extra)


def test_completions_are_of_the_clients_types(server):
    body = {**GREEDY, "prompt": ["Aromi: soup", "x"], "n": 2, "logprobs": 3, "stop": ["e"], "seed": 3}
    whole = parsed(Completion, server.post("/v1/completions", body)[1])
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    pieces = {}
    *chunks, last = events(server.post("/v1/completions", {**body, **WITH_USAGE})[1])
    for event in chunks:
        assert event["usage"] is None
        (choice,) = event["choices"]
        # OpenAI's own pieces have no reason before the last one, against the type.
        piece = parsed(
            Completion, {**event, "choices": [{**choice, "finish_reason": choice["finish_reason"] or "stop"}]}
        )
        assert (piece.id, piece.created, piece.model) == (chunks[0]["id"], chunks[0]["created"], "mine")
        pieces[choice["index"]] = pieces.get(choice["index"], "") + piece.choices[0].text
    assert parsed(Completion, last).usage == whole.usage
    assert last["choices"] == []
    assert [pieces[choice.index] for choice in whole.choices] == [choice.text for choice in whole.choices]


@pytest.mark.parametrize(("prompt", "max_tokens"), [("Aromi: soup", 3), ([5, 6, 7, 8], 0)])
def test_an_echo_has_the_logprobs_of_the_prompt(server, backbone, folder, prompt, max_tokens):
    """As lm-eval's `local-completions` asks; the whole equals the model run on all tokens at once."""
    prefix, ids = load_prefix(folder / "prefixes" / "mine.safetensors", backbone), prompt
    if isinstance(prompt, str):
        (ids,) = encode_prompts(backbone, read_text_format(prefix.header), [prompt])
    body = {**GREEDY, "prompt": prompt, "max_tokens": max_tokens, "logprobs": 1, "echo": True, "n": 2}
    whole = server.post("/v1/completions", body)[1]
    pieces = [event["choices"][0] for event in events(server.post("/v1/completions", {**body, "stream": True})[1])]
    with torch.no_grad():
        expected = outputs_of(backbone, ids, (), prefix).log_softmax(-1)[range(len(ids) - 1), ids[1:]].tolist()
    for choice in whole["choices"]:
        logprobs = choice["logprobs"]
        tokens, values = logprobs["tokens"], logprobs["token_logprobs"]
        assert len(tokens) == len(values) == len(logprobs["top_logprobs"]) == len(ids) + max_tokens
        assert tokens[: len(ids)] == [backbone.tokenizer.decode([token]) for token in ids]
        assert (values[0], logprobs["top_logprobs"][0]) == (None, None)
        assert values[1 : len(ids)] == pytest.approx(expected, abs=1e-3)
        assert choice["text"] == "".join(tokens)
        assert logprobs["text_offset"] == [len("".join(tokens[:number])) for number in range(len(tokens))]
        mine = [piece for piece in pieces if piece["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in mine) == choice["text"]
        for name in ("token_logprobs", "text_offset"):
            parts = [piece["logprobs"][name] for piece in mine if piece["logprobs"]]
            assert [value for part in parts for value in part] == pytest.approx(logprobs[name], abs=1e-6)
    assert (whole["usage"]["prompt_tokens"], whole["usage"]["completion_tokens"]) == (len(ids), 2 * max_tokens)


def test_chats_are_of_the_clients_types(server):
    options = {"n": 3, "logprobs": True, "top_logprobs": 2, "stop": "e", "seed": 3}
    body = {**GREEDY, "model": MODEL, "messages": USER, **options}
    whole = parsed(ChatCompletion, server.post("/v1/chat/completions", body)[1])
    pieces = ["" for _ in whole.choices]
    *chunks, last = events(server.post("/v1/chat/completions", {**body, **WITH_USAGE})[1])
    for event in chunks:
        chunk = parsed(ChatCompletionChunk, event)
        assert chunk.usage is None
        (choice,) = chunk.choices
        if not pieces[choice.index]:
            assert choice.delta.role in ("assistant", None)
        pieces[choice.index] += choice.delta.content or ""
    last_chunk = parsed(ChatCompletionChunk, last)
    assert (last_chunk.usage, last_chunk.choices) == (whole.usage, [])
    assert isinstance(whole.usage, CompletionUsage)
    assert pieces == [choice.message.content for choice in whole.choices]


def test_models_are_of_the_clients_types(server):
    extra = ("root", "parent", "max_model_len", "kind", "description", "task", "license", "prefix_length")
    listed = server.get("/v1/models")[1]
    models = [parsed(Model, model, extra=extra) for model in listed["data"]]
    assert (listed["object"], {model.id for model in models}) == (
        "list",
        {"facts", "mine", "plain", "pubs", "worded", MODEL},
    )
    assert parsed(Model, server.get("/v1/models/mine")[1], extra=extra).id == "mine"


# --- errors -----------------------------------------------------------------------------------------------------------

ERRORS = [
    ("me", {**GREEDY, "prompt": ""}, openai.BadRequestError, "prompt", None),
    ("nobody", {**GREEDY, "prompt": "a"}, openai.AuthenticationError, None, "invalid_api_key"),
    ("me", {**GREEDY, "prompt": "a", "model": "yours"}, openai.PermissionDeniedError, None, "model_not_allowed"),
    ("rare", {**GREEDY, "prompt": "a", "model": "nobody"}, openai.NotFoundError, None, "model_not_found"),
    ("rare", {**GREEDY, "prompt": "a"}, openai.RateLimitError, None, "rate_limit_exceeded"),
    ("me", {**GREEDY, "prompt": "a", "model": "broken"}, openai.InternalServerError, None, "model_not_served"),
]


def test_errors_are_the_clients_exceptions(server):
    for key, body, kind, param, code in ERRORS:
        with client_with(server, key) as caller, pytest.raises(kind) as caught:
            caller.completions.create(**body)
        assert (caught.value.param, caught.value.code) == (param, code)
        assert parsed(ErrorObject, caught.value.body).message in caught.value.message
        assert caught.value.request_id


def test_a_client_that_retries_waits_for_its_turn(server):
    with client_with(server, "busy", max_retries=9) as patient, ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: patient.completions.create(**LONG), range(3)))
    assert [len(answer.choices) for answer in answers] == [8, 8, 8]
