"""Prefixes that admins upload: hostile files and names change nothing."""

import asyncio
import json
import struct

import torch

from asgi_client import bearer, send
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.prefix.file import HEADER_KEY, save_verified
from prefixtune.server.auth import hash_key
from prefixtune.server.settings import KeyConfig


def hostile(file, made):
    """Files that must not be taken in, by what is wrong with them; readers' own tests have more."""
    good, prefix = file.read_bytes(), load_prefix(file)
    layers = enumerate(prefix.layers["decoder"])
    tensors = {f"decoder.{n}.{part}": t for n, pair in layers for part, t in zip(("key", "value"), pair, strict=True)}

    def changed(more, **fields):
        save_verified(made, {**tensors, **more}, HEADER_KEY, {**prefix.header, **fields})
        return made.read_bytes()

    length = struct.unpack("<Q", good[:8])[0]
    table = json.loads(good[8 : 8 + length])
    table["decoder.0.key"]["shape"] = [2, 2**40, 8]
    huge = json.dumps(table).encode()
    return {
        "empty": b"",
        "truncated": good[:-5],
        "trailing bytes": good + b"xx",
        "header of 2^62 bytes": struct.pack("<Q", 2**62) + good[8:],
        "huge shape": struct.pack("<Q", len(huge)) + huge + good[8 + length :],
        "NaN": changed({"decoder.1.value": torch.full((2, 4, 8), float("nan"))}),
        "a layer too many": changed({f"decoder.9.{part}": torch.zeros(2, 4, 8) for part in ("key", "value")}),
        "foreign tensor": changed({"../../etc/passwd": torch.zeros(2)}),
        "other weights": changed({}, backbone={**prefix.header["backbone"], "fingerprint": "0123:AAAA"}),
        "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    }


def test_hostile_files_and_names_leave_nothing(make_server, tmp_path):
    app, state = make_server(keys={"boss": KeyConfig(hash=hash_key("pt-boss"), admin=True)})
    folder = state.store.folder

    def put(name, body):
        return asyncio.run(send(app, "PUT", f"/v1/models/{name}", body, headers=bearer("boss")))

    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for what, body in hostile(folder / "a.safetensors", tmp_path.parent / "made").items():
        # The good one that is there stays.
        refused = put("a", body)
        assert (refused.status, refused.code) == (400, "invalid_prefix"), what
        assert str(folder) not in refused.body.decode(), what
    for name in ("../evil", "../../evil", ".hidden", "a\0b", "a b", "x" * 200, "..", "a\\b", "x\n"):
        assert put(name, before[folder / "a.safetensors"]).status in (400, 404), name
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
