"""A real server with keys: what is taken in when prefixes are uploaded."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from live_server import MODEL, LiveServer, make_model, make_prefix
from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.prefixes import load_prefix, make_header
from prefixtune.server.auth import hash_key, new_key

NAMES = ("admin", "alice", "bob", "scrape")
KEYS = {name: new_key() for name in NAMES}
RULES = {
    "admin": "admin = true",
    "alice": f'prefixes = ["alice-*", "{MODEL}"]',
    "bob": 'prefixes = ["bob-*"]',
    "scrape": "prefixes = []\nmetrics = true",
}
OCTETS = {"Content-Type": "application/octet-stream"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tenants")
    make_model(folder / MODEL, template=False, positions=2048)
    tables = "".join(f'[keys.{name}]\nhash = "{hash_key(KEYS[name])}"\n{RULES[name]}\n' for name in NAMES)
    limits = "train_workers = 0\nmax_upload_mib = 1\nnum_slots = 8\nmax_queue = 8\nmax_texts = 16\n"
    (folder / "serve.toml").write_text(limits + tables)
    return folder


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Any:
    return load_backbone(folder / MODEL, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def server(folder: Path, backbone: Any) -> Iterator[LiveServer]:
    prefixes = folder / "prefixes"
    prefixes.mkdir()
    for seed, name in enumerate(("alice-1", "bob-1", "bob-2")):
        make_prefix(backbone, prefixes / f"{name}.safetensors", seed)
    # All addresses: keys are configured. Asked for on loopback all the same.
    server = LiveServer(folder / MODEL, prefixes, "--config", str(folder / "serve.toml"), "--host", "0.0.0.0")
    yield server.wait()
    server.stop()


def complete(server: LiveServer, key: str, model: str = MODEL, **more: Any) -> tuple[int, Any, dict[str, str]]:
    body = {"model": model, "prompt": "abc", "max_tokens": 3, "temperature": 0, **more}
    return server.post("/v1/completions", body, key=key)


def code(answer: tuple[int, Any, dict[str, str]]) -> tuple[int, str]:
    return answer[0], answer[1]["error"]["code"]


# --- uploads ----------------------------------------------------------------------------------------------------------


def put(server: LiveServer, name: str, body: bytes, key: str = "admin") -> tuple[int, Any, Any]:
    return server.request("PUT", f"/v1/models/{name}", body, key=KEYS[key], headers=OCTETS)


@pytest.fixture(scope="module")
def good(folder: Path, backbone: Any) -> bytes:
    return make_prefix(backbone, folder / "good.safetensors", 50, task="e2e").read_bytes()


def test_a_prefix_is_uploaded_used_replaced_and_deleted(
    server: LiveServer, folder: Path, backbone: Any, good: bytes
) -> None:
    status, answer, _ = put(server, "alice-new", good)
    assert (status, answer) == (201, {"id": "alice-new", "object": "model", "bytes": len(good), "replaced": False})
    assert (folder / "prefixes" / "alice-new.safetensors").read_bytes() == good
    first = complete(server, KEYS["alice"], "alice-new", max_tokens=20)[1]["choices"][0]["text"]
    shown = server.get("/v1/models/alice-new", key=KEYS["admin"])[1]
    assert (shown["task"], shown["prefix_length"]) == ("e2e", {"decoder": 4})
    other = make_prefix(backbone, folder / "other.safetensors", 51).read_bytes()
    status, answer, _ = put(server, "alice-new", other)
    assert (status, answer["replaced"]) == (200, True)
    assert complete(server, KEYS["alice"], "alice-new", max_tokens=20)[1]["choices"][0]["text"] != first
    assert server.request("DELETE", "/v1/models/alice-new", key=KEYS["admin"])[0] == 200
    assert complete(server, KEYS["alice"], "alice-new")[0] == 404
    assert code(server.request("DELETE", "/v1/models/alice-new", key=KEYS["admin"])) == (404, "model_not_found")
    assert not (folder / "prefixes" / "alice-new.safetensors").exists()


def hostile(backbone: Any, folder: Path, good: bytes) -> dict[str, bytes]:
    """Files that must not be taken in, by what is wrong with them."""
    prefix = load_prefix(folder / "good.safetensors")
    tensors = {
        f"decoder.{index}.{part}": tensor
        for index, pair in enumerate(prefix.layers["decoder"])
        for part, tensor in zip(("key", "value"), pair, strict=True)
    }
    facts = {"prefixtune": json.dumps({**prefix.header})}

    def file(changed: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
        path = folder / "made.safetensors"
        save_file({**tensors, **changed}, path, facts if metadata is None else metadata)
        return path.read_bytes()

    def with_field(value: str) -> str:
        return json.dumps(prefix.header)[:-1] + f', "description": {value}}}'

    length = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + length])
    huge = dict(header)
    huge["decoder.0.key"] = {**huge["decoder.0.key"], "shape": [2, 2**40, 8]}
    text = json.dumps(huge).encode()
    other = {
        **prefix.header,
        "backbone": {**make_header(backbone)["backbone"], "name": "another", "fingerprint": "0123:AAAA"},
    }
    return {
        "empty": b"",
        "truncated": good[:-5],
        "header cut off": good[:20],
        "trailing bytes": good + b"xx",
        "header of 2^62 bytes": struct.pack("<Q", 2**62) + good[8:],
        "header of 900 KiB": struct.pack("<Q", 900 * 1024) + b'{"a": "' + b"x" * 900 * 1024,
        "huge shape": struct.pack("<Q", len(text)) + text + good[8 + length :],
        "NaN": file({"decoder.1.value": torch.full((2, 4, 8), float("nan"))}),
        "infinity": file({"decoder.0.key": torch.full((2, 4, 8), float("inf"))}),
        "wrong heads": file({"decoder.0.key": torch.zeros(3, 4, 8), "decoder.0.value": torch.zeros(3, 4, 8)}),
        "wrong size": file({"decoder.0.key": torch.zeros(2, 4, 9)}),
        "lengths differ": file({"decoder.0.key": torch.zeros(2, 5, 8), "decoder.0.value": torch.zeros(2, 5, 8)}),
        "a layer too many": file({"decoder.2.key": torch.zeros(2, 4, 8), "decoder.2.value": torch.zeros(2, 4, 8)}),
        "foreign tensor": file({"../../etc/passwd": torch.zeros(2)}),
        "no header": file({}, {}),
        "header no JSON": file({}, {"prefixtune": "{"}),
        "newer format": file({}, {"prefixtune": json.dumps({**prefix.header, "format_version": 99})}),
        "other weights": file({}, {"prefixtune": json.dumps(other)}),
        "infinity in the header": file({}, {"prefixtune": with_field("1e999")}),
        "no number in the header": file({}, {"prefixtune": with_field("NaN")}),
        "nesting in the header": file({}, {"prefixtune": with_field("[" * 900 + "]" * 900)}),
        "much nesting in the header": file({}, {"prefixtune": with_field("[" * 9000 + "]" * 9000)}),
        "half a character in the header": file({}, {"prefixtune": with_field(r'"\ud800"')}),
        "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    }


def test_hostile_files_are_refused_and_leave_nothing(
    server: LiveServer, folder: Path, backbone: Any, good: bytes
) -> None:
    before = {path.name: path.read_bytes() for path in (folder / "prefixes").iterdir()}
    for what, body in hostile(backbone, folder, good).items():
        # The good one that is there stays.
        status, answer, _ = put(server, "bob-1", body)
        assert (status, answer["error"]["code"]) == (400, "invalid_prefix"), what
        assert not any(place in answer["error"]["message"] for place in (str(folder), ".upload")), what
    assert {path.name: path.read_bytes() for path in (folder / "prefixes").iterdir()} == before
    assert complete(server, KEYS["bob"], "bob-1")[0] == 200
    assert server.get("/healthz")[0] == 200


def test_names_cannot_leave_the_folder(server: LiveServer, folder: Path, good: bytes) -> None:
    before = sorted(path for path in folder.rglob("*"))
    for name in ("..%2fevil", "%2e%2e%2f%2e%2e%2fevil", ".hidden", "a%00b", "a%20b", "x" * 200, "..", "a%5cb", "x%0a"):
        assert put(server, name, good)[0] in (400, 404)
    assert sorted(path for path in folder.rglob("*")) == before


def test_an_upload_is_bounded_and_needs_an_admin(server: LiveServer, folder: Path, good: bytes) -> None:
    before = sorted((folder / "prefixes").iterdir())
    assert code(put(server, "alice-2", good, key="alice")) == (403, "admin_key_needed")
    assert put(server, MODEL, good)[0] == 400
    host, _, port = server.url.removeprefix("http://").partition(":")
    head = f"PUT /v1/models/big HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS['admin']}\r\n"
    with socket.create_connection((host.replace("0.0.0.0", "127.0.0.1"), int(port))) as untold:
        untold.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        try:
            for _ in range(20):
                untold.sendall(piece)
        except OSError:
            pass  # It did not wait for the rest.
        assert b" 413 " in untold.recv(4096)
    assert sorted((folder / "prefixes").iterdir()) == before


def test_an_interrupted_upload_leaves_nothing(server: LiveServer, folder: Path, good: bytes) -> None:
    before = sorted((folder / "prefixes").iterdir())
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host.replace("0.0.0.0", "127.0.0.1"), int(port))) as half:
        head = f"PUT /v1/models/half HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS['admin']}\r\n"
        half.sendall(f"{head}Content-Length: {len(good)}\r\n\r\n".encode() + good[: len(good) // 2])
        server.until(lambda: len(list((folder / "prefixes").iterdir())) > len(before))
    server.until(lambda: sorted((folder / "prefixes").iterdir()) == before)
    assert server.get("/v1/models/half", key=KEYS["admin"])[0] == 404
