"""`/v1/files`: uploads by OpenAI's client, and forms that are wrong."""

import asyncio
import errno
import json
import os

import openai
import pytest

from asgi_client import bearer, keys, send
from openai_client import ask

ROWS = b"".join(json.dumps({"prompt": f"q{n}", "completion": f"a{n}"}).encode() + b"\n" for n in range(50))
BOUNDARY = "boundary-1"
DISPOSITION = 'Content-Disposition: form-data; name="{name}"'


def part(name, data, *, filename=None, headers=""):
    disposition = DISPOSITION.format(name=name) + (f'; filename="{filename}"' if filename is not None else "")
    return f"--{BOUNDARY}\r\n{disposition}\r\n{headers}\r\n".encode() + data + b"\r\n"


PURPOSE = part("purpose", b"fine-tune")
FILE = part("file", ROWS, filename="rows.jsonl")
END = f"--{BOUNDARY}--\r\n".encode()


def post(app, body, boundary=BOUNDARY, **headers):
    kind = f"multipart/form-data; boundary={boundary}"
    return asyncio.run(send(app, "POST", "/v1/files", body, headers={"content-type": kind, **headers}))


def stored(tmp_path):
    """Everything that is kept, hidden folders too."""
    return [path.name for path in (tmp_path / "data" / "files").glob("*") if path.suffix != ".lock"]


@pytest.fixture
def app(make_server, tmp_path):
    return make_server()[0]


def test_openais_client_uploads_lists_reads_and_deletes(app):
    async def work(client):
        made = await client.files.create(file=("my/rows.jsonl", ROWS), purpose="fine-tune")
        assert (made.object, made.filename, made.bytes, made.purpose) == ("file", "rows.jsonl", len(ROWS), "fine-tune")
        assert (made.status, made.status_details) == ("processed", None)
        assert made.to_dict()["prefixtune"]["targets"] == 50
        text = await client.files.create(file=b"Owls fly at night.", purpose="document")
        assert await client.files.retrieve(made.id) == made
        assert (await client.files.content(made.id)).content == ROWS
        assert [file.id async for file in client.files.list()] == [text.id, made.id]
        assert [file.id async for file in client.files.list(limit=1, order="asc")] == [made.id, text.id]
        assert [file.id async for file in client.files.list(purpose="document")] == [text.id]
        assert (await client.files.delete(made.id)).deleted
        with pytest.raises(openai.NotFoundError, match="there is no file"):
            await client.files.retrieve(made.id)
        with pytest.raises(openai.NotFoundError) as caught:
            await client.files.delete("file-1")
        assert caught.value.code == "file_not_found"

    ask(app, work)


def test_forms_that_are_wrong_leave_nothing(app, tmp_path):
    for body in (
        b"no form at all", PURPOSE + FILE + FILE + END, part("purpos", b"fine-tune") + FILE + END,
        part("expires_after[seconds]", b"3600") + PURPOSE + FILE + END, part("expires_after", b"") * 1000 + END,
        f"--{BOUNDARY}\r\n\r\nno headers\r\n".encode() + END,
    ):  # fmt: skip
        assert post(app, body).status == 400
    assert post(app, PURPOSE + FILE + END, f"{BOUNDARY}; charset=undefined").status == 400
    assert stored(tmp_path) == []


def test_the_limits_of_a_key(make_server, tmp_path):
    app, _ = make_server(max_file_mib=1, keys=keys(ann={"max_files": 2, "max_storage_mib": 1}))
    large = part("file", b"x" * 700_000, filename="large.txt")
    document = part("purpose", b"document")
    assert post(app, document + large + END, **bearer("ann")).status == 200
    response = post(app, document + large + END, **bearer("ann"))
    assert (response.status, response.code) == (413, "no_room")
    assert post(app, PURPOSE + FILE + END, **bearer("ann")).status == 200
    response = post(app, PURPOSE + FILE + END, **bearer("ann"))
    assert (response.status, response.code) == (403, "too_many_files")
    for status, code, data in ((400, "empty_file", b""), (413, "file_too_large", b"x" * (2**20 + 1))):
        response = post(app, document + part("file", data, filename="a.txt") + END, **bearer("ann"))
        assert (response.status, response.code) == (status, code)
    assert len(stored(tmp_path)) == 2


@pytest.mark.parametrize("where", ["shutil.copyfileobj", "os.rename"])
def test_a_full_disk_leaves_nothing(app, tmp_path, monkeypatch, where):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))

    with monkeypatch.context() as patch:
        patch.setattr(f"prefixtune.jobs.files.{where}", fail)
        response = post(app, PURPOSE + FILE + END)
    assert (response.status, response.code) == (507, "storage_failed")
    assert str(tmp_path) not in response.body.decode()
    assert stored(tmp_path) == []
    assert post(app, PURPOSE + FILE + END).status == 200


def preview(app, data, filename, purpose="fine-tune"):
    made = post(app, part("purpose", purpose.encode()) + part("file", data, filename=filename) + END).json
    # The server itself reads nothing of a file, which may unpack to gigabytes.
    next(app.state.server.training.folder.files.glob(f"{made['id']}/data.*")).unlink()
    response = asyncio.run(send(app, "GET", f"/v1/files/{made['id']}/preview"))
    assert response.status == 200
    return response.json


def test_previews(app):
    found = preview(app, ROWS, "rows.jsonl")["examples"]
    # Prompts and completions are chats of one turn.
    assert found[0]["messages"] == [
        {"role": "user", "content": "q0", "trained": False},
        {"role": "assistant", "content": "a0", "trained": True},
    ]
    assert len(found) == 24
    rows = [{"source": "word " * 900, "target": "yes"}] * 8
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    shown = {"source": rows[0]["source"].strip()[:2000], "targets": ["yes"]}
    assert preview(app, data, "rows.jsonl")["examples"] == [shown] * 8
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}] * 3000
    (long,) = preview(app, json.dumps({"messages": chat}).encode(), "chats.jsonl")["examples"]
    assert len(long["messages"]) == 50
    (text,) = preview(app, b"Owls fly at night. " * 50, "owls.txt", "document")["examples"]
    assert text["source"].startswith("Owls fly")
    assert preview(app, b"document,summary\na b,a\n", "a.csv")["examples"] == [{"source": "a b", "targets": ["a"]}]
    assert preview(app, b"text\n", "empty.csv")["examples"] == []
