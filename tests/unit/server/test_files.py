"""`/v1/files`: uploads by OpenAI's client, and forms that are wrong."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from asgi_client import Response, bearer, send
from openai_client import ask
from prefixtune.server.auth import hash_key
from prefixtune.server.settings import KeyConfig

ROWS = b"".join(json.dumps({"prompt": f"q{n}", "completion": f"a{n}"}).encode() + b"\n" for n in range(50))
BOUNDARY = "boundary-1"
DISPOSITION = 'Content-Disposition: form-data; name="{name}"'


def part(name: str, data: bytes, *, filename: str | None = None, headers: str = "") -> bytes:
    disposition = DISPOSITION.format(name=name) + (f'; filename="{filename}"' if filename is not None else "")
    return f"--{BOUNDARY}\r\n{disposition}\r\n{headers}\r\n".encode() + data + b"\r\n"


PURPOSE = part("purpose", b"fine-tune")
FILE = part("file", ROWS, filename="rows.jsonl")
END = f"--{BOUNDARY}--\r\n".encode()


def post(app: Any, body: bytes, boundary: str = BOUNDARY, **headers: str) -> Response:
    kind = f"multipart/form-data; boundary={boundary}"
    return asyncio.run(send(app, "POST", "/v1/files", body, headers={"content-type": kind, **headers}))


def stored(tmp_path: Path) -> list[str]:
    """Everything below the folders of owners, hidden folders too."""
    return [path.name for path in (tmp_path / "data" / "files").glob("*/*")]


@pytest.fixture
def app(make_server: Callable[..., Any], tmp_path: Path) -> Any:
    return make_server()[0]


def test_openais_client_uploads_lists_reads_and_deletes(app: Any) -> None:
    async def work(client: openai.AsyncOpenAI) -> None:
        made = await client.files.create(file=("my/rows.jsonl", ROWS), purpose="fine-tune")
        assert (made.object, made.filename, made.bytes, made.purpose) == ("file", "rows.jsonl", len(ROWS), "fine-tune")
        assert (made.status, made.status_details) == ("processed", None)
        assert made.to_dict()["prefixtune"]["targets"] == 50  # type: ignore[index]
        text = await client.files.create(file=b"Owls fly at night.", purpose="document")  # type: ignore[arg-type]
        assert await client.files.retrieve(made.id) == made
        assert (await client.files.content(made.id)).content == ROWS
        assert [file.id async for file in client.files.list()] == [text.id, made.id]
        assert [file.id async for file in client.files.list(limit=1, order="asc")] == [made.id, text.id]
        assert [file.id async for file in client.files.list(purpose="document")] == [text.id]
        assert (await client.files.delete(made.id)).deleted
        with pytest.raises(openai.NotFoundError, match="there is no file"):
            await client.files.retrieve(made.id)

    ask(app, work)


def test_the_file_may_come_before_its_purpose_and_in_any_pieces(app: Any, tmp_path: Path) -> None:
    body = FILE + PURPOSE + END
    assert post(app, body).json["prefixtune"]["rows"] == 50

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 7):
            yield body[start : start + 7]

    async def work() -> httpx2.Response:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app)) as client:
            headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
            return await client.post("http://127.0.0.1:8000/v1/files", content=pieces(), headers=headers)

    assert asyncio.run(work()).json()["prefixtune"]["rows"] == 50


@pytest.mark.parametrize(
    "body",
    [
        b"", b"no form at all", PURPOSE + END, FILE + END,
        part("purpose", b"batch") + FILE + END, PURPOSE + FILE + FILE + END,
        part("purpos", b"fine-tune") + FILE + END, part("expires_after[seconds]", b"3600") + PURPOSE + FILE + END,
        PURPOSE + part("file", ROWS) + END, PURPOSE + part("file", b"", filename="rows.jsonl") + END,
        part("expires_after", b"") * 1000 + END, f"--{BOUNDARY}\r\n\r\nno headers\r\n".encode() + END,
    ],
)  # fmt: skip
def test_forms_that_are_wrong_leave_nothing(app: Any, tmp_path: Path, body: bytes) -> None:
    assert post(app, body).status == 400
    assert stored(tmp_path) == []


def test_keys_see_their_own_files_and_admins_all(make_server: Callable[..., Any], tmp_path: Path) -> None:
    keys = {name: KeyConfig(hash=hash_key(f"pt-{name}"), admin=name == "boss") for name in ("ann", "ben", "boss")}
    keys["guest"] = KeyConfig(hash=hash_key("pt-guest"), train=False)
    app, _ = make_server(keys=keys)
    made = post(app, PURPOSE + FILE + END, **bearer("ann")).json

    def status(key: str, method: str, path: str) -> int:
        return asyncio.run(send(app, method, path, headers=bearer(key))).status

    def listed(key: str) -> int:
        return len(asyncio.run(send(app, "GET", "/v1/files", headers=bearer(key))).json["data"])

    paths = [f"/v1/files/{made['id']}", f"/v1/files/{made['id']}/content"]
    assert [status("ben", "GET", path) for path in paths] == [404, 404]
    assert status("ben", "DELETE", paths[0]) == 404
    assert [listed(key) for key in ("ann", "ben", "boss")] == [1, 0, 1]
    assert post(app, PURPOSE + FILE + END, **bearer("guest")).code == "training_not_allowed"
    assert status("guest", "DELETE", paths[0]) == 403
    assert status("boss", "DELETE", paths[0]) == 200


def test_the_limits_of_a_key(make_server: Callable[..., Any], tmp_path: Path) -> None:
    key = KeyConfig(hash=hash_key("pt-ann"), max_files=2, max_storage_mib=1)
    app, _ = make_server(max_file_mib=1, keys={"ann": key})
    large = part("file", b"x" * 700_000, filename="large.txt")
    document = part("purpose", b"document")
    assert post(app, document + large + END, **bearer("ann")).status == 200
    response = post(app, document + large + END, **bearer("ann"))
    assert (response.status, response.code) == (413, "no_room")
    assert post(app, PURPOSE + FILE + END, **bearer("ann")).status == 200
    response = post(app, PURPOSE + FILE + END, **bearer("ann"))
    assert (response.status, response.code) == (403, "too_many_files")
    assert len(stored(tmp_path)) == 2


@pytest.mark.parametrize("where", ["open", "write", "publish"])
def test_a_full_disk_leaves_nothing(app: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))

    target = {
        "open": "prefixtune.jobs.files.work_folder",
        "write": "prefixtune.jobs.files.shutil.copyfileobj",
        "publish": "prefixtune.jobs.files.os.rename",
    }[where]
    with monkeypatch.context() as patch:
        patch.setattr(target, fail)
        response = post(app, PURPOSE + FILE + END)
    assert (response.status, response.code) == (507, "storage_failed")
    assert str(tmp_path) not in response.body.decode()
    assert stored(tmp_path) == []
    assert post(app, PURPOSE + FILE + END).status == 200


def preview(app: Any, data: bytes, filename: str, purpose: str = "fine-tune") -> Any:
    made = post(app, part("purpose", purpose.encode()) + part("file", data, filename=filename) + END).json
    response = asyncio.run(send(app, "GET", f"/v1/files/{made['id']}/preview"))
    assert response.status == 200
    return response.json


def test_a_preview_shows_examples_and_what_the_model_reads_of_one(app: Any) -> None:
    found = preview(app, ROWS, "rows.jsonl")
    # Prompts and completions are chats of one turn.
    assert found["examples"][0]["messages"] == [
        {"role": "user", "content": "q0", "trained": False},
        {"role": "assistant", "content": "a0", "trained": True},
    ]
    assert len(found["examples"]) == 24
    assert found["sampled"] == 50
    assert "q0" in "".join(one["text"] for one in found["parts"] if not one["trained"])
    assert "a0" in "".join(one["text"] for one in found["parts"] if one["trained"])
    lengths = found["lengths"]
    assert sum(lengths["counts"]) == 50
    assert len(lengths["edges"]) == len(lengths["counts"]) + 1
    assert found["cuts"] == "All fit the model's 512 tokens."
    # A job without options takes steps of 16 targets.
    assert found["steps_per_epoch"] * 16 >= 50


def test_a_preview_says_what_is_cut(app: Any) -> None:
    rows = [{"source": "word " * (900 if number == 3 else 3), "target": "yes"} for number in range(8)]
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    found = preview(app, data, "rows.jsonl")
    assert found["cuts"] == "1 of 8 examples are cut to the model's 512 tokens."
    assert found["examples"][3] == {"source": rows[3]["source"].strip()[:2000], "targets": ["yes"]}


def test_a_preview_of_very_long_conversations(make_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A template writes all earlier messages for each answer: the longest conversations would take hours."""
    app, state = make_server()
    template = "{% for m in messages %}<s>{{ m.content }}<pad>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
    monkeypatch.setattr(state.backbone.tokenizer, "chat_template", template)
    turn = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    data = b"".join(json.dumps({"messages": turn * count}).encode() + b"\n" for count in (3000, 2, 2000, 3))
    found = preview(app, data, "chats.jsonl")
    assert (found["sampled"], len(found["examples"])) == (2, 4)
    # Nor are all of their messages shown.
    assert [len(example["messages"]) for example in found["examples"]] == [50, 4, 50, 6]
    alone = preview(app, data.splitlines()[0], "chats.jsonl")
    assert alone["cuts"] == "The conversations are too long to be measured here."
    assert len(alone["examples"]) == 1


def test_previews_of_what_has_no_examples(app: Any) -> None:
    text = preview(app, b"Owls fly at night. " * 50, "owls.txt", "document")
    assert text["examples"][0]["source"].startswith("Owls fly")
    assert text["cuts"].startswith("It has ")
    assert preview(app, b"text\n", "empty.csv")["examples"] == []
    two_forms = preview(app, b"prompt,completion,question,answer\n1,2,3,4\n", "two.csv")
    assert (two_forms["examples"], two_forms["lengths"]) == ([], None)
    one_label = preview(app, b"text,label\ngood,1\nfine,1\n", "labels.csv")
    assert (one_label["lengths"], "label" in one_label["cuts"]) == (None, True)
    labels = preview(app, b"text,label\ngood,yes\nbad,no\n", "labels.csv")
    assert labels["parts"][0]["text"]
