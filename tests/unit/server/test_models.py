"""`/v1/models`: the file of a prefix that one's own job trained."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asgi_client import Response, bearer, completion, send
from prefixtune.backbone.prefixes import make_header
from prefixtune.prefix.artifact import save_prefix
from prefixtune.prefix.prefix import Prefix
from prefixtune.server.auth import hash_key
from prefixtune.server.settings import KeyConfig


def download(app: Any, name: str, key: str = "") -> Response:
    headers = bearer(key) if key else {}
    return asyncio.run(send(app, "GET", f"/v1/models/{name}/file", headers=headers))


def test_a_result_is_downloaded_by_its_owner_and_admins(
    make_server: Callable[..., Any], backbone: Any, tmp_path: Path, random_prefix: Callable[..., Any]
) -> None:
    rules = {name: KeyConfig(hash=hash_key(f"pt-{name}"), admin=name == "boss") for name in ("ann", "bob", "boss")}
    app, state = make_server(keys=rules)
    header = {**make_header(backbone), "job": {"id": "ftjob-1", "owner": "ann"}}
    path = save_prefix(tmp_path / "prefixes" / "hers.safetensors", Prefix(random_prefix(backbone, 4, 3).layers, header))
    state.store.reload()
    answer = download(app, "hers", "ann")
    assert (answer.status, answer.body) == (200, path.read_bytes())
    assert answer.headers["content-length"] == str(path.stat().st_size)
    assert answer.headers["content-disposition"] == "attachment; filename*=UTF-8''hers.safetensors"
    assert download(app, "hers", "boss").body == path.read_bytes()
    assert download(app, "a", "boss").status == 200
    # A prefix that no job of hers made, and one that does not exist.
    assert (download(app, "a", "ann").status, download(app, "nothing", "ann").status) == (403, 404)
    assert download(app, "hers", "bob").status in (403, 404)
    assert download(app, "nothing", "boss").status == 404
    path.write_bytes(b"broken")
    assert download(app, "hers", "boss").status == 503
    path.unlink()
    assert download(app, "hers", "boss").status == 404


def test_without_keys_every_result_is_downloaded(
    make_server: Callable[..., Any], backbone: Any, tmp_path: Path, random_prefix: Callable[..., Any]
) -> None:
    app, state = make_server()
    header = {**make_header(backbone), "job": {"id": "ftjob-1", "owner": "ann"}}
    save_prefix(tmp_path / "prefixes" / "hers.safetensors", Prefix(random_prefix(backbone, 4, 3).layers, header))
    state.store.reload()
    assert download(app, "hers").status == 200
    assert download(app, "a").status == 403


def test_a_loaded_prefix_waits_for_none_that_is_read(
    make_server: Callable[..., Any],
    backbone: Any,
    tmp_path: Path,
    random_prefix: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many others a caller asks for at once."""
    app, state = make_server()
    prefix = Prefix(random_prefix(backbone, 4, 3).layers, make_header(backbone))
    for number in range(40):
        save_prefix(tmp_path / "prefixes" / f"cold-{number}.safetensors", prefix)
    state.store.reload()
    go_on, load = threading.Event(), state.store._load

    def slowly(name: str) -> Any:
        assert go_on.wait(60)
        return load(name)

    async def all_at_once() -> tuple[int, list[int]]:
        await send(app, "POST", "/v1/completions", completion(model="a"))
        monkeypatch.setattr(state.store, "_load", slowly)
        cold = [send(app, "POST", "/v1/completions", completion(model=f"cold-{number}")) for number in range(40)]
        waiting = [asyncio.ensure_future(one) for one in cold]
        await asyncio.sleep(0.2)
        warm = await asyncio.wait_for(send(app, "POST", "/v1/completions", completion(model="a")), 30)
        assert not any(one.done() for one in waiting)
        go_on.set()
        return warm.status, [(await one).status for one in waiting]

    assert asyncio.run(all_at_once()) == (200, [200] * 40)


@pytest.mark.parametrize("path", ["/v1/models/{}", "/v1/tasks/{}"])
def test_to_look_at_joined_prefixes_counts_as_a_request(make_server: Callable[..., Any], path: str) -> None:
    """They are joined for it."""
    rules = KeyConfig(hash=hash_key("pt-ann"), requests_per_minute=1)
    app, _ = make_server(keys={"ann": rules})

    def look(name: str) -> int:
        return asyncio.run(send(app, "GET", path.format(name), headers=bearer("ann"))).status

    assert [look(name) for name in ("a", "a", "a+b", "b", "b+a")] == [200, 200, 200, 200, 429]


def test_among_many_names_no_similar_one_is_looked_for(
    make_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take milliseconds for thousands of names, in which no stream goes on."""
    app, state = make_server(keys={"boss": KeyConfig(hash=hash_key("pt-boss"), admin=True)})

    def message(path: str) -> str:
        response = asyncio.run(send(app, "GET", path, headers=bearer("boss")))
        assert response.status == 404
        return str(response.json["error"]["message"])

    assert "Did you mean 'a'" in message("/v1/models/aa")
    assert "Did you mean 'a'" in message("/admin/prefixes/aa")
    monkeypatch.setattr("prefixtune.server.models.store._FEW", 1)
    monkeypatch.setattr(state.store, "names", None)
    assert message("/v1/models/aa") == "there is no model 'aa'."
    assert message("/admin/prefixes/aa") == "there is no prefix 'aa'."


@pytest.mark.parametrize(("method", "path"), [("DELETE", "/v1/models/a"), ("GET", "/v1/models/a/file")])
def test_to_delete_and_to_download_count_as_requests(make_server: Callable[..., Any], method: str, path: str) -> None:
    rules = KeyConfig(hash=hash_key("pt-ann"), requests_per_minute=1)
    app, _ = make_server(keys={"ann": rules})
    statuses = [asyncio.run(send(app, method, path, headers=bearer("ann"))).status for _ in range(2)]
    assert statuses == [403, 429]


def test_deletions_of_one_key_do_not_delay_texts_of_another(
    make_server: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do they read more of the folder than the file of the name."""
    app, state = make_server(keys={name: KeyConfig(hash=hash_key(f"pt-{name}")) for name in ("ann", "bob")})
    go_on, refresh = threading.Event(), state.store.refresh
    looked: list[str] = []

    def slowly(name: str) -> None:
        assert go_on.wait(60)
        refresh(name)

    async def all_at_once() -> tuple[int, set[int]]:
        await send(app, "POST", "/v1/completions", completion(model="a"), headers=bearer("bob"))
        monkeypatch.setattr(state.store, "refresh", slowly)
        monkeypatch.setattr(state.store, "_refresh", looked.append)
        # More than there are threads of any kind.
        deleting = [
            asyncio.ensure_future(send(app, "DELETE", "/v1/models/a", headers=bearer("ann"))) for _ in range(100)
        ]
        await asyncio.sleep(0.2)
        text = await asyncio.wait_for(
            send(app, "POST", "/v1/completions", completion(model="a"), headers=bearer("bob")), 30
        )
        assert not any(one.done() for one in deleting)
        go_on.set()
        return text.status, {(await one).status for one in deleting}

    assert asyncio.run(all_at_once()) == (200, {403})
    assert looked == ["a"] * 100


def test_a_file_that_cannot_be_read_now_is_asked_for_again(
    make_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    app, _ = make_server()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr("prefixtune.prefix.tensor_file.open", fail, raising=False)
        refused = asyncio.run(send(app, "POST", "/v1/completions", completion(model="a")))
    assert (refused.status, refused.code, refused.headers["retry-after"]) == (503, "busy", "5")
    assert asyncio.run(send(app, "POST", "/v1/completions", completion(model="a"))).status == 200
