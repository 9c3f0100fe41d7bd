"""Output by a JSON schema: through `generate`, the engine and a real server, beside texts without one."""

from __future__ import annotations

import json

import openai
import pytest
import torch
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from live_server import MODEL, fill_folder, serve
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.engine.engine import TorchEngine
from prefixtune.engine.request import Request, SamplingParams
from prefixtune.errors import ConfigError, RequestError
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate, generate_ids
from prefixtune.sampling.grammar import Grammar, compile_json_schema

SCHEMAS = [
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yy"]}}, "required": ["a", "b"],
     "additionalProperties": False},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    {"enum": ["red", "green", None]},
    {"type": "object", "properties": {"s": {"type": "string", "maxLength": 5}}, "required": ["s"],
     "additionalProperties": False},
]  # fmt: skip
# Objects that differ late: all of them must be followed at once.
COMPLEX = [{"type": "object", "properties": {f"p{n}": {"type": "null"} for n in range(m, m + 190)}} for m in range(5)]


@pytest.fixture(scope="module")
def backbone(folder):
    return fill_folder(folder, {"pubs": {"task": "e2e"}, "facts": {"task": "e2e"}})


@pytest.fixture(scope="module")
def server(folder, backbone):
    server = serve(folder)
    yield server
    assert server.stop() == 0


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def valid(text, schema):
    return bool(Draft202012Validator(schema).is_valid(json.loads(text)))


def test_a_model_may_have_fewer_scores_than_its_tokenizer_has_tokens(backbone):
    state = compile_json_schema(backbone, SCHEMAS[0]).start()

    def allowed(size):
        # Two texts: each has a row of its own.
        (first, second), failed = Grammar.allowed({4: state, 7: state.start()}, size, torch.device("cpu"))
        assert torch.equal(first, second)
        assert not failed
        return first

    whole = allowed(len(backbone.tokenizer))
    assert whole.any()
    for size in (len(whole) - 1, len(whole) + 3):
        found = allowed(size)
        assert len(found) == size
        assert torch.equal(found[: len(whole)], whole[:size])
        assert not found[len(whole) :].any()


@pytest.mark.parametrize("schema", SCHEMAS, ids=["object", "array", "enum", "text"])
def test_one_running_batch_follows_every_schema_and_is_generates(backbone, folder, schema):
    prefix = load_prefix(folder / "prefixes" / "pubs.safetensors", backbone)
    grammar = compile_json_schema(backbone, schema)
    greedy, drawn = SamplingParams(max_new_tokens=200), SamplingParams(max_new_tokens=200, temperature=1.0, seed=3)
    prompt = (5, 6, 7)
    requests = [
        Request(prompt, prefix, greedy, grammar=grammar),
        Request(prompt, None, SamplingParams(max_new_tokens=30)),
        Request(prompt, None, drawn, grammar=grammar, n=3),
        Request(prompt, None, SamplingParams(max_new_tokens=200, frequency_penalty=2), grammar=grammar),
    ]
    engine = TorchEngine(backbone)
    outputs = engine.run(requests)
    for request, texts in zip(requests, outputs, strict=True):
        for output in texts:
            assert request.grammar is None or output.finish_reason == "length" or valid(output.text, schema)
    assert all(output.finish_reason == "stop" for output in outputs[2])
    # What runs beside is what it is alone.
    ((alone,),) = engine.run([requests[1]])
    assert outputs[1][0].text == alone.text
    config = GenerateConfig(max_new_tokens=200, response_schema=json.dumps(schema))
    (ids,) = generate_ids(backbone, [list(prompt)], [prefix], config=config)
    assert ids == [token.id for token in outputs[0][0].tokens]


def test_a_batch_of_generate_has_a_grammar_for_every_row(backbone):
    config = {"max_new_tokens": 100, "temperature": 1.0, "seed": 4, "response_schema": json.dumps(SCHEMAS[1])}
    outputs = generate(backbone, ["a", "bb ccc", "d"], config=config)
    assert all(valid(output, SCHEMAS[1]) for output in outputs)
    # A number ends where the model says so, and rows end at different times.
    config |= {"response_schema": '{"type": "integer"}', "max_new_tokens": 60}
    assert all(isinstance(json.loads(output), int) for output in generate(backbone, ["a", "b", "c"] * 4, config=config))


def test_a_text_that_a_stop_string_ended_leaves_the_others_in_the_batch_alone(tiny_backbone):
    llama = tiny_backbone("llama")
    assert llama.pad_id != llama.eos_id
    config = {"max_new_tokens": 60, "response_schema": json.dumps({"enum": ["red", "green", "blue"]})}
    prompts = [[number] for number in range(12)]
    whole, cut = (
        generate_ids(llama, prompts, [None] * 12, config=GenerateConfig(**config, stop=stop)) for stop in ((), ("re",))
    )
    texts = [llama.decode(ids) for ids in whole]
    assert len(set(texts)) > 1
    assert [llama.decode(ids).split("re")[0] for ids in cut] == [text.split("re")[0] for text in texts]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_schema_begins_after_a_first_token_that_is_forced(temperature, tiny_models, enclosing_tokenizer):
    model = tiny_models("mbart")
    model.generation_config.forced_bos_token_id = 65
    backbone = Backbone.from_model(model, enclosing_tokenizer, "tiny-mbart")
    config = GenerateConfig(max_new_tokens=100, temperature=temperature, seed=0, response_schema=json.dumps(SCHEMAS[2]))
    for ids in generate_ids(backbone, [[5, 6, 7], [8, 9]], [None] * 2, config=config):
        assert ids[0] == 65
        assert valid(backbone.decode(ids[1:]), SCHEMAS[2])


@pytest.mark.parametrize("stream", [False, True])
def test_openais_client_gets_json(client, stream):
    class Pub(BaseModel):
        stars: int
        open: bool

    messages = [{"role": "user", "content": "Hello!"}]
    options = {"model": "facts", "messages": messages, "max_tokens": 400, "seed": 5}
    if stream:
        with client.chat.completions.stream(**options, response_format=Pub) as events:
            parsed = events.get_final_completion().choices[0]
    else:
        parsed = client.chat.completions.parse(**options, response_format=Pub).choices[0]
    assert parsed.finish_reason == "stop"
    assert isinstance(parsed.message.parsed, Pub)


def test_json_objects_and_completions(client):
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMAS[0]}}
    answer = client.completions.create(
        model="pubs", prompt=["a", "b"], n=2, max_tokens=300, seed=1, extra_body={"response_format": schema}
    )
    assert all(valid(choice.text, SCHEMAS[0]) for choice in answer.choices)
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    messages = [{"role": "user", "content": "Hello!"}]
    chat = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=20, response_format={"type": "json_object"}
    )
    assert str(chat.choices[0].message.content).startswith("{")


@pytest.mark.parametrize(
    "schema", [{"type": "nonsense"}, {"$ref": "http://example.com/schema"}, {"$ref": "#"}, {"anyOf": COMPLEX}]
)
def test_schemas_that_cannot_be_used(client, backbone, schema):
    with pytest.raises(RequestError):
        compile_json_schema(backbone, schema)
    messages = [{"role": "user", "content": "Hello!"}]
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="facts", messages=messages, response_format=form)
    assert error.value.param == "response_format"


def test_a_schema_that_becomes_too_complex_is_the_requests_fault(backbone):
    schema = {
        "type": "object",
        "properties": {"p": {"anyOf": COMPLEX}},
        "required": ["p"],
        "additionalProperties": False,
    }
    grammar = compile_json_schema(backbone, schema)
    first, second = TorchEngine(backbone).run([Request((5, 6), grammar=grammar), Request((5, 6))])
    assert (first[0].finish_reason, first[0].refused) == ("error", True)
    assert "cannot go on by its JSON schema: " in first[0].error
    assert (second[0].finish_reason, second[0].refused) == ("length", False)


def test_generates_options_say_what_is_wrong_before_the_model_loads(tmp_path):
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    assert GenerateConfig(response_schema=str(tmp_path / "schema.json")).response_schema == '{"type":"object"}'
    (tmp_path / "wrong.json").write_text("[1")
    for value, words in ((str(tmp_path / "none.json"), "No such file"), (str(tmp_path / "wrong.json"), "not JSON")):
        with pytest.raises(ConfigError, match=words):
            GenerateConfig(response_schema=value)
    with pytest.raises(ConfigError, match="num_beams"):
        GenerateConfig(response_schema="{}", num_beams=2)
