"""`/v1/models`: what clients read, the file of a prefix that one's own job trained, and uploads, hostile ones too."""

import asyncio

from asgi_client import bearer, completion, keys, send


def download(app, name, key=""):
    headers = bearer(key) if key else {}
    return asyncio.run(send(app, "GET", f"/v1/models/{name}/file", headers=headers))


def test_a_result_is_downloaded_by_its_owner(make_server, backbone, tmp_path, save_random_prefix, monkeypatch):
    app, _ = make_server(keys=keys(ann={}, bob={}, boss={"admin": True}))
    hers = {"id": "ftjob-1", "owner": "ann"}
    path = save_random_prefix(tmp_path / "prefixes" / "hers.safetensors", backbone, seed=3, job=hers)
    answer = download(app, "hers", "ann")
    assert (answer.status, answer.body) == (200, path.read_bytes())
    assert answer.headers["content-length"] == str(path.stat().st_size)
    assert answer.headers["content-disposition"] == 'attachment; filename="hers.safetensors"'
    assert download(app, "hers", "boss").body == path.read_bytes()
    assert download(app, "a", "boss").status == 200
    # A prefix that no job of hers made, and one that does not exist.
    assert (download(app, "a", "ann").status, download(app, "nothing", "ann").status) == (403, 404)
    assert download(app, "hers", "bob").status in (403, 404)
    assert (download(app, "nothing", "boss").status, download(app, "tiny", "boss").status) == (404, 400)
    with monkeypatch.context() as patched:
        # By its path, another file is opened than was asked for.
        patched.setattr("prefixtune.server.catalog.signature_of", lambda _: (1, 2, 3))
        assert download(app, "hers", "ann").code == "busy"
    path.write_bytes(b"broken")
    assert download(app, "hers", "boss").status == 503
    path.unlink()
    assert download(app, "hers", "boss").status == 404


def test_a_file_is_not_read_for_its_size_and_is_always_closed(make_server, tmp_path, monkeypatch):
    app, state = make_server(keys=keys(boss={"admin": True}))
    opened, open_file = [], state.catalog.open
    monkeypatch.setattr(state.catalog, "open", lambda *args: opened.append(open_file(*args)) or opened[-1])
    size = (tmp_path / "prefixes" / "a.safetensors").stat().st_size
    head = asyncio.run(send(app, "HEAD", "/v1/models/a/file", headers=bearer("boss")))
    assert (head.status, head.headers["content-length"], head.body) == (200, str(size), b"")

    async def lose():
        raise TimeoutError

    asyncio.run(send(app, "GET", "/v1/models/a/file", headers=bearer("boss"), before_reading=lose))
    assert [file.closed for file in opened] == [True, True]


def test_what_reads_or_joins_a_file_counts_as_a_request(make_server):
    paths = ("/v1/models/{}", "/v1/tasks/{}")
    names = [f"key{number}" for number in range(5)]
    app, _ = make_server(keys=keys(**{name: {"requests_per_minute": 1} for name in names}))

    def ask(key, method, path):
        return asyncio.run(send(app, method, path, headers=bearer(key))).status

    for path, key in zip(paths, names, strict=False):
        assert [ask(key, "GET", path.format(name)) for name in ("a+b", "b+a")] == [200, 429]
    for method, path, key in (("DELETE", "/v1/models/a", names[2]), ("GET", "/v1/models/a/file", names[3])):
        assert [ask(key, method, path) for _ in range(2)] == [403, 429]
    # The list looks at every file.
    assert [ask(names[4], "GET", "/v1/models") for _ in range(2)] == [200, 429]


def test_a_file_that_cannot_be_read_now_is_asked_for_again(make_server, monkeypatch):
    app, _ = make_server()

    def fail(*_, **__):
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr("prefixtune.prefix.file.open", fail, raising=False)
        refused = asyncio.run(send(app, "POST", "/v1/completions", completion(model="a")))
    assert (refused.status, refused.code, refused.headers["retry-after"]) == (503, "busy", "5")
    assert asyncio.run(send(app, "POST", "/v1/completions", completion(model="a"))).status == 200


def test_an_admin_uploads_replaces_and_sees_what_is_refused(make_server, tmp_path):
    app, _ = make_server(keys=keys(ann={}, boss={"admin": True}))
    body = (tmp_path / "prefixes" / "b.safetensors").read_bytes()

    def put(name, content, key="boss"):
        response = asyncio.run(send(app, "PUT", f"/v1/models/{name}", content, headers=bearer(key)))
        return response.status, response.json.get("error", {}).get("code", "")

    assert (put("fresh", body), put("fresh", body)) == ((201, ""), (200, ""))
    assert put("fresh", body, "ann") == (403, "admin_key_needed")
    assert put("fresh", body[:-4]) == (400, "invalid_prefix")
    assert put("tiny", body)[0] == put("..fresh", body)[0] == 400
    for name in ("bad.safetensors", ".hidden.safetensors", "notes.txt"):
        (tmp_path / "prefixes" / name).write_bytes(b"broken")
    listed = asyncio.run(send(app, "GET", "/v1/models", headers=bearer("boss"))).json
    assert [model["id"] for model in listed["data"]] == ["tiny", "a", "b", "fresh"]
    assert list(listed["refused"]) == ["bad"]
    assert "refused" not in asyncio.run(send(app, "GET", "/v1/models", headers=bearer("ann"))).json


def test_models_are_described_as_vllm_does(make_server):
    app, _ = make_server()
    models = {model["id"]: model for model in asyncio.run(send(app, "GET", "/v1/models")).json["data"]}
    assert (models["tiny"]["root"], models["tiny"]["parent"], models["tiny"]["max_model_len"]) == ("tiny", None, 512)
    assert (models["a"]["root"], models["a"]["parent"], models["a"]["max_model_len"]) == ("a", "tiny", 508)
    joined = asyncio.run(send(app, "GET", "/v1/models/a+b")).json
    assert (joined["parent"], joined["max_model_len"]) == ("tiny", 504)
