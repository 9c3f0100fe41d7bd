"""A request for `route:PATTERN`: the memory with the nearest stored question answers, and the answer names it."""

import asyncio

import pytest

from asgi_client import bearer, completion, send
from prefixtune.backbone.prefixes import load_prefix, make_header
from prefixtune.inference.generate import generate
from prefixtune.prefix.prefix import Prefix, save_prefix
from prefixtune.server.auth import hash_key
from prefixtune.server.settings import KeyConfig


@pytest.fixture
def serve(make_server, backbone, tmp_path, random_prefix, text_format):
    """A factory of an application with the memories `owl` and `fox`, beside `a` and `b`, which store no questions."""

    def make(**options):
        app, _ = make_server(**options)
        for seed, animal in enumerate(("owl", "fox")):
            asked = [[f"Where is the {animal}?", "here"], ["When?", "now"]]
            header = make_header(backbone, task="records", text_format=text_format) | {"questions": asked}
            prefix = Prefix(random_prefix(backbone, 4, 7 + seed).layers, header)
            save_prefix(tmp_path / "prefixes" / f"{animal}.safetensors", prefix)
        return app

    return make


def ask(app, body, path="/v1/completions", **options):
    return asyncio.run(send(app, "POST", path, body, **options))


def test_the_memory_that_a_text_is_about_answers_and_is_named(serve, backbone, tmp_path):
    app = serve()
    short = {"max_tokens": 8, "temperature": 0}
    for model, text, name in (
        ("route:*", "The Fox, please", "fox"),
        ("route:*", "an OWL", "owl"),
        ("route:o*", "an owl", "owl"),
        ("route:[fo]*", "an owl", "owl"),
    ):
        whole = ask(app, completion(model=model, prompt=text, **short)).json
        prefix = load_prefix(tmp_path / "prefixes" / f"{name}.safetensors", backbone)
        assert whole["model"] == name
        assert [whole["choices"][0]["text"]] == generate(backbone, [text], prefix, max_new_tokens=8)
    messages = [{"role": "user", "content": "the fox"}]
    body = {"model": "route:*", "messages": messages, **short, "stream": True}
    pieces = ask(app, body, "/v1/chat/completions").body.decode()
    assert '"model":"fox"' in pieces
    assert '"model":"owl"' not in pieces


def test_a_text_about_none_of_them_is_the_backbones(serve):
    app = serve()
    # A word that both store tells nothing.
    for text in ("zzz", "When?", "the"):
        assert ask(app, completion(model="route:*", prompt=text, max_tokens=2)).json["model"] == "tiny"


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "route:x*"}, 404, "model"),
        ({"model": "route:"}, 404, "model"),
        ({"model": "route:a"}, 404, "model"),
        ({"model": "route:tiny"}, 404, "model"),
        ({"model": f"route:{'*' * 600}"}, 404, "model"),
        ({"model": "route:*", "prompt": ["the owl", "the fox"]}, 400, "prompt"),
        ({"model": "route:*", "prompt": [1, 2]}, 400, "prompt"),
        ({"model": "route:*", "prompt": "the owl", "prefixes": ["fox"]}, 400, "prefixes"),
    ],
)
def test_what_cannot_be_routed_is_one_error(serve, body, status, param):
    answer = ask(serve(), {"prompt": "the owl", **body})
    assert answer.status == status, answer.body
    assert answer.json["error"]["param"] in (param, None if status == 404 else param)


def test_only_what_a_key_may_use_is_routed_to(serve):
    keys = {"reader": KeyConfig(hash=hash_key("pt-reader"), prefixes=("owl", "tiny"))}
    app, headers = serve(keys=keys), {"headers": bearer("reader")}
    assert ask(app, completion(model="route:*", prompt="the fox", max_tokens=2), **headers).json["model"] == "tiny"
    assert ask(app, completion(model="route:*", prompt="the owl", max_tokens=2), **headers).json["model"] == "owl"
    assert ask(app, completion(model="route:fox", prompt="the fox", max_tokens=2), **headers).status == 404
