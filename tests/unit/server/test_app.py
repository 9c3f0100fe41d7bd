"""The application: its routes and document, pages of other origins, unexpected errors, metrics, silent streams."""

import asyncio
import logging

from asgi_client import NEVER, Response, bearer, completion, keys, send, texts_when_done
from prefixtune.engine.request import SequenceOutput
from prefixtune.server.metrics import Metrics


def test_a_page_of_an_allowed_origin_may_use_openais_client(make_server):
    app, _ = make_server(cors_origins=("https://a.example",))
    sent = "authorization,content-type,idempotency-key,x-stainless-os,x-stainless-retry-count"
    headers = {
        "origin": "https://a.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": sent,
    }
    response = asyncio.run(send(app, "OPTIONS", "/v1/chat/completions", headers=headers))
    assert (response.status, response.headers["access-control-allow-headers"]) == (200, sent)
    for origin in ("https://b.example", "https://a.example"):
        response = asyncio.run(send(app, "GET", "/v1/models", headers={"origin": origin}))
        assert (response.headers.get("access-control-allow-origin") == origin) is (origin == "https://a.example")
    assert response.headers["access-control-expose-headers"] == "*"


def test_the_document_says_which_operations_need_a_key(make_server):
    app, _ = make_server(keys=keys(me={"prefixes": ()}, boss={"admin": True}))
    # Every key may read it, as the list of models.
    document = asyncio.run(send(app, "GET", "/openapi.json", headers=bearer("me"))).json
    assert {"/v1/completions", "/v1/files/{file_id}/preview", "/", "/metrics"} <= document["paths"].keys()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            response = asyncio.run(send(app, method.upper(), path.replace("{name}", "a")))
            assert (response.status == 401) is bool(operation.get("security")), path
            weak = asyncio.run(send(app, method.upper(), path.replace("{name}", "a"), headers=bearer("me")))
            if "right" in operation.get("description", ""):
                assert weak.code in ("admin_key_needed", "metrics_not_allowed")
    assert "/docs" not in asyncio.run(send(make_server(playground=False)[0], "GET", "/openapi.json")).json["paths"]


def test_a_key_is_asked_for_before_the_body(make_server):
    app, _ = make_server(keys=keys(me={}))
    for path in ("/v1/completions", "/v1/tasks/a", "/classify", "/v1/fine_tuning/jobs", "/v1/files"):
        assert asyncio.run(asyncio.wait_for(send(app, "POST", path, NEVER), 5)).code == "invalid_api_key"


def test_without_keys_only_this_machine_is_answered(make_server):
    app, _ = make_server()
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:80", "127.0.0.2:80", "[::1]:8000", "[0:0:0:0:0:0:0:1]"):
        assert asyncio.run(send(app, "GET", "/v1/models", headers={"host": host})).status == 200
    for host in ("evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example:80", "10.0.0.1", "[::2]", ""):
        assert asyncio.run(send(app, "GET", "/v1/models", headers={"host": host})).code == "host_not_allowed"
    for name in ("x-forwarded-for", "x-forwarded-host", "x-real-ip", "forwarded", "via"):
        assert asyncio.run(send(app, "GET", "/v1/models", headers={name: "127.0.0.1"})).code == "key_needed"


def test_details_of_an_unexpected_error_are_only_in_the_log(make_server, monkeypatch, caplog):
    app, state = make_server()

    def fail(*_):
        raise ValueError("a secret of /srv/models")

    monkeypatch.setattr(state.catalog, "files", fail)
    with caplog.at_level(logging.ERROR, "prefixtune.server"):
        response = asyncio.run(send(app, "POST", "/v1/completions", completion()))
    assert (response.status, response.code) == (500, "internal_error")
    assert "secret" not in response.body.decode()
    assert response.headers["x-request-id"] in response.json["error"]["message"]
    (record,) = caplog.records
    assert "a secret" in str(record.exc_info)
    assert texts_when_done(state) == 0


def test_a_request_keeps_the_id_that_a_proxy_gave_it(make_server, caplog):
    app, _ = make_server()

    def id_of(given):
        caplog.clear()
        with caplog.at_level(logging.INFO, "prefixtune.server"):
            response = asyncio.run(send(app, "GET", "/v1/models", headers={"x-request-id": given}))
        (record,) = caplog.records
        assert response.headers["x-request-id"] in str(vars(record))
        return response.headers["x-request-id"]

    for good in ("0123456789abcdef" * 2, "a.B_c-1", "x" * 64):
        assert id_of(good) == good
    for bad in ("", "x" * 65, "a b", 'a"b', "a\tb", "é", "<b>"):
        assert id_of(bad) != bad
        assert len(id_of(bad)) == 32


def test_metrics_of_prefixes_are_bounded(make_server, monkeypatch):
    _, state = make_server()
    monkeypatch.setattr("prefixtune.server.metrics._MOST_LABELS", 2)
    metrics = Metrics(state.config, state.worker, state.store)
    for index in range(1000):
        metrics.text_done([f"tenant-{index}"], "stop", 1)
    shown = metrics.render().decode()
    assert 'prefixtune_new_tokens_total{prefix="other"} 998.0' in shown
    assert 'prefixtune_new_tokens_total{prefix="tenant-1"} 1.0' in shown


def test_a_silent_stream_sends_keep_alive_comments(make_server, monkeypatch):
    app, state = make_server()
    monkeypatch.setattr("prefixtune.server.api.generation.KEEP_ALIVE_SECONDS", 0.05)
    later = []
    monkeypatch.setattr(state.worker, "submit", lambda request, on_output, deadline: later.append((request, on_output)))

    async def wait():
        response = Response()
        running = asyncio.ensure_future(send(app, "POST", "/v1/completions", completion(stream=True), into=response))
        async with asyncio.timeout(10):
            while response.body.count(b": waiting\n\n") < 2:
                await asyncio.sleep(0.01)
        request, tell = later[0]
        tell(SequenceOutput(request.id, 0, (), "done", "stop"))
        return await running

    response = asyncio.run(wait())
    assert response.body.count(b": waiting\n\n") >= 2
    assert response.body.endswith(b"data: [DONE]\n\n")
