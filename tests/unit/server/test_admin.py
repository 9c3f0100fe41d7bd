"""Administration: uploads onto a failing disk, and what is written down of changes."""

from __future__ import annotations

import asyncio
import errno
import io
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asgi_client import bearer, completion, send
from prefixtune.server.auth import hash_key
from prefixtune.server.settings import KeyConfig


@pytest.mark.parametrize("where", ["receive", "close", "make", "copy"])
@pytest.mark.parametrize(
    ("code", "refusal"),
    [
        (errno.ENOSPC, (507, "no_space")), (errno.EDQUOT, (507, "no_space")), (errno.EROFS, (507, "storage_failed")),
        (errno.EACCES, (507, "storage_failed")), (errno.EIO, (507, "storage_failed")), (errno.EMFILE, (503, "busy")),
    ],
)  # fmt: skip
def test_an_upload_onto_a_failing_disk_changes_nothing(
    make_server: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    where: str,
    code: int,
    refusal: tuple[int, str],
) -> None:
    app, state = make_server(keys={"boss": KeyConfig(hash=hash_key("pt-boss"), admin=True)})
    folder = tmp_path / "prefixes"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    first = asyncio.run(send(app, "POST", "/v1/completions", completion(), headers=bearer("boss"))).json["choices"]
    failures: list[str] = []

    def fail(*_: Any, **__: Any) -> Any:
        failures.append(where)
        raise OSError(code, os.strerror(code), str(folder / "a.safetensors"))

    class FullFile(io.BytesIO):
        def write(self, data: Any) -> int:
            return fail() if where == "receive" else len(data)

        def __exit__(self, *_: Any) -> None:
            fail()

    if where == "make":
        monkeypatch.setattr("prefixtune.utils.files.tempfile.mkdtemp", fail)
    elif where == "copy":
        monkeypatch.setattr("prefixtune.server.models.store.shutil.copyfile", fail)
    else:
        monkeypatch.setattr("prefixtune.server.api.admin.open", lambda *_: FullFile(), raising=False)
    for name in ("a", "fresh"):
        body = before["b.safetensors"]
        response = asyncio.run(send(app, "PUT", f"/admin/prefixes/{name}", body, headers=bearer("boss")))
        assert (response.status, response.code, response.json["error"]["type"]) == (*refusal, "server_error")
        assert set(response.json["error"]) == {"message", "type", "param", "code"}
        assert str(folder) not in response.body.decode()
    assert len(failures) >= 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    again = asyncio.run(send(app, "POST", "/v1/completions", completion(), headers=bearer("boss")))
    assert again.json["choices"] == first
    assert state.store.names() == ["a", "b"]
    assert state.store.refused == {}


def test_changes_by_an_admin_are_in_the_log(
    make_server: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app, _ = make_server(keys={"boss": KeyConfig(hash=hash_key("pt-boss"), admin=True)})
    body = (tmp_path / "prefixes" / "b.safetensors").read_bytes()
    with caplog.at_level(logging.INFO, "prefixtune"):
        asyncio.run(send(app, "PUT", "/admin/prefixes/fresh", body, headers=bearer("boss")))
        asyncio.run(send(app, "DELETE", "/admin/prefixes/fresh", headers=bearer("boss")))
        asyncio.run(send(app, "DELETE", "/admin/prefixes/none", headers=bearer("boss")))
    lines: list[Any] = [getattr(record, "fields") for record in caplog.records if record.message == "audit"]  # noqa: B009
    changes = [(line["action"], line["key"], line["model"]) for line in lines]
    assert changes == [("prefix.upload", "boss", "fresh"), ("prefix.delete", "boss", "fresh")]
