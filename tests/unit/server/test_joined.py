"""Requests that join prefixes: the same as one composed file, kept by content, counted and allowed part by part."""

import asyncio
import json
import logging
import threading

import pytest
import torch

from asgi_client import bearer, completion, keys, send
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.errors import BackboneError
from prefixtune.inference.generate import generate
from prefixtune.prefix.compose import concatenate
from prefixtune.prefix.prefix import save_prefix
from prefixtune.server import prefixes

USER = [{"role": "user", "content": "hello"}]


@pytest.fixture
def composed(backbone, tmp_path):
    """A function: `composed("a", "b")` joins files of the server's folder into a file and reads that."""

    def compose(*names):
        parts = [load_prefix(tmp_path / "prefixes" / f"{name}.safetensors", backbone) for name in names]
        path = save_prefix(tmp_path / "composed.safetensors", concatenate(parts, backbone.rotation))
        return load_prefix(path, backbone)

    return compose


@pytest.fixture
def joins(monkeypatch):
    """The thread of every join that was computed."""
    threads = []

    def counted(*arguments, **options):
        threads.append(threading.current_thread())
        return concatenate(*arguments, **options)

    monkeypatch.setattr(prefixes, "concatenate", counted)
    return threads


def ask(app, path, body, **options):
    return asyncio.run(send(app, "POST", path, body, **options))


def texts(response):
    """The texts of a response, whole or in pieces."""
    if not response.headers["content-type"].startswith("text/event-stream"):
        return [choice.get("text") or choice["message"]["content"] for choice in response.json["choices"]]
    pieces = {}
    for part in response.body.decode().split("\n\n")[:-2]:
        for choice in json.loads(part.removeprefix("data: "))["choices"]:
            piece = choice.get("text") or choice.get("delta", {}).get("content") or ""
            pieces[choice["index"]] = pieces.get(choice["index"], "") + piece
    return [text for _, text in sorted(pieces.items())]


def test_every_endpoint_writes_as_the_composed_file_does(make_server, backbone, composed):
    app, _ = make_server()
    (expected,) = generate(backbone, ["hello"], composed("b", "a"), max_new_tokens=8)
    (swapped,) = generate(backbone, ["hello"], composed("a", "b"), max_new_tokens=8)
    assert expected != swapped
    for named, stream in (
        ({"model": "b+a"}, True),
        ({"prefixes": ["b", "a"]}, False),
        ({"model": "tiny", "prefixes": ["b", "a"]}, True),
    ):
        short = {"max_tokens": 8, "temperature": 0, "stream": stream}
        whole = ask(app, "/v1/completions", {**named, "prompt": "hello", **short, "n": 3})
        assert texts(whole) == [expected] * 3, whole.body
        assert b'"model":"b+a"' in whole.body
        chat = ask(app, "/v1/chat/completions", {**named, "messages": USER, **short})
        assert texts(chat) == [expected]
    task = ask(app, "/v1/tasks/b+a", {"name": "hello", "max_tokens": 8})
    assert f'"output":{json.dumps(expected, ensure_ascii=False)}' in task.body.decode()
    assert texts(ask(app, "/v1/completions", {"model": "a+b", "prompt": "hello", **short})) == [swapped]


def test_a_join_is_computed_once_and_outside_the_event_loop(make_server, joins):
    app, state = make_server()

    async def send_all():
        return list(
            await asyncio.gather(
                *(send(app, "POST", "/v1/completions", completion(model="a+b", prompt=f"{i}")) for i in range(8))
            )
        )

    assert {response.status for response in asyncio.run(send_all())} == {200}
    assert len(joins) == 1
    assert joins[0] is not threading.main_thread()
    ask(app, "/v1/completions", completion(prefixes=["a", "b"], model="tiny"))
    assert len(joins) == 1
    # The two parts, and what they give.
    assert state.store.num_loaded == 3
    ask(app, "/v1/completions", completion(model="b+a"))
    assert len(joins) == 2


def test_keys_are_rounded_once(make_server, backbone, composed):
    _, state = make_server()
    backbone.model.bfloat16()
    joined = state.store.load({name: state.store.file(name) for name in "ab"})
    assert joined.equal(composed("a", "b").to(torch.bfloat16))


def test_a_prefix_that_is_deleted_when_it_is_read_is_none(make_server, monkeypatch, tmp_path):
    app, state = make_server()
    load, path = state.store.load, tmp_path / "prefixes" / "a.safetensors"
    monkeypatch.setattr(state.store, "load", lambda files: path.unlink(missing_ok=True) or load(files))
    assert ask(app, "/v1/completions", completion(model="a+b")).status == 404


def test_a_replaced_part_gives_a_new_join(make_server, backbone, composed, joins, save_random_prefix, tmp_path):
    app, state = make_server()
    folder = tmp_path / "prefixes"
    before = texts(ask(app, "/v1/completions", completion(model="a+b")))
    first = (folder / "b.safetensors").read_bytes()
    facts = {name: load_prefix(folder / "b.safetensors").header[name] for name in ("task", "text_format")}
    save_random_prefix(folder / "b.safetensors", backbone, 6, seed=9, **facts)
    after = texts(ask(app, "/v1/completions", completion(model="a+b")))
    assert after == generate(backbone, ["hello"], composed("a", "b"), max_new_tokens=5)
    assert (len(joins), after != before) == (2, True)
    (tmp_path / "uploaded").write_bytes(first)
    state.store.put("b", tmp_path / "uploaded")
    assert texts(ask(app, "/v1/completions", completion(model="a+b"))) == before
    state.store.delete("b")
    gone = ask(app, "/v1/completions", completion(model="a+b"))
    assert (gone.status, gone.code) == (404, "model_not_found")
    assert "'b'" in gone.json["error"]["message"]


def test_a_join_that_is_too_long_is_refused_with_all_lengths(
    backbone, make_server, joins, save_random_prefix, tmp_path
):
    app, _ = make_server()
    for name, length in (("long", 300), ("longer", 400)):
        save_random_prefix(tmp_path / "prefixes" / f"{name}.safetensors", backbone, length, task="records")
    refused = ask(app, "/v1/completions", completion(model="long+a+longer"))
    assert (refused.status, refused.code) == (400, "context_length_exceeded")
    assert joins == []
    # By its full length, as one prefix of it.
    refused = ask(app, "/v1/completions", completion(model="a+long", max_tokens=210))
    assert refused.code == "context_length_exceeded"


def test_a_key_must_allow_every_part(make_server):
    app, state = make_server(keys=keys(a={"prefixes": ("a*",)}, all={}))
    for body in (completion(model="a+b"), completion(model="a+a2+b"), completion(model="a+b", prefixes=["a", "b"])):
        refused = ask(app, "/v1/completions", body, headers=bearer("a"))
        assert (refused.status, refused.code) == (403, "model_not_allowed"), refused.body
        assert "'b'" in refused.json["error"]["message"]
    for path in ("/v1/tasks/a+b", "/v1/models/a+b"):
        assert asyncio.run(send(app, "GET", path, headers=bearer("a"))).status == 403
    formatted = {"source": "x", "format_of": "a+b"}
    assert ask(app, "/v1/tasks/tiny", formatted, headers=bearer("a")).status == 403
    assert ask(app, "/v1/completions", completion(model="a+b"), headers=bearer("all")).status == 200

    async def watch():
        disconnected = asyncio.Event()
        body = completion(model="a+b", max_tokens=400)
        running = send(app, "POST", "/v1/completions", body, headers=bearer("all"), disconnected=disconnected)
        task = asyncio.ensure_future(running)
        while not state.worker.snapshot().running:
            await asyncio.sleep(0.005)
        seen = [(await send(app, "GET", "/v1/status", headers=bearer(name))).json["running"] for name in ("a", "all")]
        disconnected.set()
        await asyncio.gather(task, return_exceptions=True)
        return [[text["model"] for text in running] for running in seen]

    assert asyncio.run(watch()) == [[None], ["a+b"]]


def test_metrics_and_the_log_name_the_parts(make_server, caplog):
    app, state = make_server()
    with caplog.at_level(logging.INFO, "prefixtune.server"):
        answer = ask(app, "/v1/completions", completion(model="a+b", n=2))
    ask(app, "/v1/completions", completion(model="a"))
    assert caplog.records[0].__dict__["fields"]["model"] == answer.json["model"] == "a+b"
    lines = state.metrics.render().decode().splitlines()
    assert 'prefixtune_texts_total{finished="length",prefix="a"} 3.0' in lines
    assert 'prefixtune_texts_total{finished="length",prefix="b"} 2.0' in lines
    assert 'prefixtune_new_tokens_total{prefix="b"} 10.0' in lines
    assert not [line for line in lines if "a+b" in line]


def test_names_with_a_plus(make_server, tmp_path):
    app, state = make_server(backbone_id="tiny+more")
    # The backbone's own name is one name.
    assert ask(app, "/v1/completions", completion(model="tiny+more")).json["model"] == "tiny+more"
    # A file of such a name is never served, and hides no join.
    (tmp_path / "prefixes" / "a+b.safetensors").write_bytes((tmp_path / "prefixes" / "a.safetensors").read_bytes())
    assert state.store.names() == ["a", "b"]
    assert "not a valid name" in state.store.refused["a+b"]
    answer = ask(app, "/v1/completions", completion(model="a+b"))
    assert (answer.status, answer.json["model"]) == (200, "a+b")


def test_a_backbone_whose_keys_cannot_be_turned_serves_single_prefixes(make_server, monkeypatch):
    app, state = make_server()

    def fail(_):
        raise BackboneError("'tiny' scales positions by the text's length.", hint="use single prefixes.")

    monkeypatch.setattr(type(state.backbone), "rotation", property(fail))
    refused = ask(app, "/v1/completions", completion(model="a+b"))
    assert (refused.status, refused.json["error"]["param"]) == (400, "model")
    assert ask(app, "/v1/completions", completion()).status == 200
