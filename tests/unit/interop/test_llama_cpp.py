"""Sequence-state files of llama.cpp: their bytes, what patching refuses, and what the check of a server notices."""

from __future__ import annotations

import dataclasses
import json
import struct
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixtune.errors import BackboneError, CheckpointError, ConfigError
from prefixtune.interop.llama_cpp import check as llama_cpp_check
from prefixtune.interop.llama_cpp.check import NotInEffectError, check
from prefixtune.interop.llama_cpp.export import export_llama_cpp, placeholders_for, rows_of
from prefixtune.interop.llama_cpp.state import encode_blob, encode_file, patch_file

Make = Callable[..., Any]

ROWS = [(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([[0.5, -1.0], [2.0, -2.0], [4.0, -4.0]]))]
"""One layer, three positions, one head of size two."""

TOKENS = [7, 8, 9]

CELLS = struct.pack("<II iIi iIi iIi", 1, 3, 0, 1, 0, 1, 1, 0, 2, 1, 0)


def test_a_file_spelled_out() -> None:
    written = encode_file(ROWS, TOKENS, version=4, kv_type="f32")
    expected = struct.pack("<III3i", 0x67677371, 4, 3, 7, 8, 9) + CELLS + struct.pack("<IIII", 0, 1, 0, 0)
    expected += struct.pack("<iQ6f", 0, 8, 1, 2, 3, 4, 5, 6) + struct.pack("<iQ6f", 0, 8, 0.5, -1, 2, -2, 4, -4)
    assert written == expected


def test_version_3_says_nothing_of_rotation_and_values_may_be_transposed() -> None:
    written = encode_file(ROWS, TOKENS, version=3, kv_type="f16", transposed=True)
    expected = struct.pack("<III3i", 0x67677371, 3, 3, 7, 8, 9) + CELLS + struct.pack("<II", 1, 1)
    expected += struct.pack("<iQ6e", 1, 4, 1, 2, 3, 4, 5, 6) + struct.pack("<iII6e", 1, 2, 2, 0.5, 2, 4, -1, -2, -4)
    assert written == expected
    blob = encode_blob(ROWS, version=3, kv_type="f16", transposed=True)
    assert blob == struct.pack("<Ii", 0xAF143CD8, 0) + expected[24:]


@pytest.mark.parametrize("options", [{"version": 5}, {"version": 1}, {"kv_type": "q8_0"}])
def test_unknown_layouts_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="known are versions 2, 3, 4 with f32, f16, bf16") as caught:
        encode_file(ROWS, TOKENS, **options)
    assert "--patch" in caught.value.hint


def test_numbers_beyond_half_precision_are_refused() -> None:
    large = [(ROWS[0][0] * 1e5, ROWS[0][1])]
    with pytest.raises(ConfigError, match="float16") as caught:
        encode_file(large, TOKENS)
    assert "f32" in caught.value.hint
    assert encode_file(large, TOKENS, kv_type="f32")


def test_keys_of_llama_are_interleaved_and_values_never(tiny_backbone: Make, random_prefix: Make) -> None:
    for name, order in (("llama", [0, 4, 1, 5, 2, 6, 3, 7]), ("qwen2", list(range(8)))):
        backbone = tiny_backbone(name)
        prefix = random_prefix(backbone, 3)
        key, value = prefix.layers["decoder"][1]
        rows = rows_of(prefix, backbone)[1]
        for head in (0, 1):
            assert torch.equal(rows[0][:, head * 8 : head * 8 + 8], key[head][:, order])
            assert torch.equal(rows[1][:, head * 8 : head * 8 + 8], value[head])


def test_placeholders_follow_from_the_numbers(tiny_backbone: Make, random_prefix: Make) -> None:
    backbone = tiny_backbone("llama")
    prefix = random_prefix(backbone, 40)
    tokens = placeholders_for(prefix, backbone)
    assert len(tokens) == 40
    assert tokens == placeholders_for(random_prefix(backbone, 40), backbone)
    assert tokens != placeholders_for(random_prefix(backbone, 40, seed=1), backbone)
    assert not set(tokens) & set(backbone.tokenizer.all_special_ids)


# --- patching --------------------------------------------------------------------------------------------------------

OTHER = [(pair[0] * 0 + 9, pair[1] * 0 - 9) for pair in ROWS]


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize("transposed", [True, False])
def test_a_patched_file_differs_in_its_numbers_only(version: int, transposed: bool) -> None:
    options = {"version": version, "kv_type": "f16", "transposed": transposed}
    patched, found = patch_file(encode_file(OTHER, TOKENS, **options), ROWS, TOKENS)
    assert patched == encode_file(ROWS, TOKENS, **options)
    assert found == {"state_version": version, "kv_type": "f16", "transposed": transposed}


def test_tokens_may_be_wrapped_and_streams_empty() -> None:
    """As a server with several slots writes it."""
    saved = encode_file(OTHER, TOKENS, version=4)
    head = struct.pack("<III7i", 0x67677371, 4, 7, -1, 1, 3, *TOKENS, 0) + struct.pack("<II", 3, 0)
    tail = struct.pack("<I", 0)
    wrapped = head + saved[28:] + tail
    patched, _ = patch_file(wrapped, ROWS, TOKENS)
    assert patched == head + encode_file(ROWS, TOKENS, version=4)[28:] + tail


def test_cells_may_be_in_any_order() -> None:
    saved = encode_file(OTHER, TOKENS, version=4, kv_type="f32")
    shuffled = CELLS[:8] + CELLS[32:44] + CELLS[8:32]
    patched, _ = patch_file(saved.replace(CELLS, shuffled), ROWS, TOKENS)
    turned = [(key[[2, 0, 1]], value[[2, 0, 1]]) for key, value in ROWS]
    assert patched == encode_file(turned, TOKENS, version=4, kv_type="f32").replace(CELLS, shuffled)


def broken(start: int, layout: str, *values: Any, version: int = 4) -> bytes:
    saved = bytearray(encode_file(OTHER, TOKENS, version=version))
    struct.pack_into(f"<{layout}", saved, start, *values)
    return bytes(saved)


CELLS_END = 24 + len(CELLS)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "ends within its part at byte 0"),
        (b"GGUF" + bytes(40), "is not a saved slot"),
        (encode_blob(OTHER), "is not a saved slot"),
        (broken(4, "I", 5), "has version 5; known are 2, 3, 4"),
        (broken(8, "I", 10**9), "ends within its part"),
        (broken(12, "i", 6), "holds other tokens than the 3 placeholders"),
        (broken(24, "I", 0), "holds no cells"),
        (broken(32, "i", 1), "holds 3 cells, not one for each of the 3 placeholders"),
        (broken(CELLS_END + 4, "I", 2), "holds 2 layers, but the prefix has 1"),
        (broken(CELLS_END + 8, "I", 1), "holds rotated keys or values"),
        (broken(CELLS_END + 16, "i", 8), "holds a cache of ggml type 8, not one of f32, f16, bf16"),
        (broken(CELLS_END + 20, "Q", 8), "holds 4 numbers per position and layer, but the prefix has 2"),
        (encode_file(OTHER, TOKENS)[:-1], "ends within its part"),
        (encode_file(OTHER, TOKENS) + bytes(4), "goes on for 4 bytes behind its layers"),
        (encode_file([(OTHER[0][0][:2], OTHER[0][1][:2])], TOKENS), "holds 2 cells, not one for each of the 3"),
    ],
)
def test_files_that_cannot_be_patched(data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        patch_file(data, ROWS, TOKENS, "slots/a.bin")
    assert "'slots/a.bin'" in caught.value.message
    assert caught.value.hint


def test_quantized_caches_say_what_to_do() -> None:
    for data in (broken(CELLS_END + 8, "I", 1), broken(CELLS_END + 16, "i", 8)):
        with pytest.raises(CheckpointError) as caught:
            patch_file(data, ROWS, TOKENS)
        assert "--cache-type-k f16 --cache-type-v f16" in caught.value.hint


# --- the folder ------------------------------------------------------------------------------------------------------


def test_the_folder(tiny_backbone: Make, random_prefix: Make, tmp_path: Path) -> None:
    backbone = tiny_backbone("llama")
    header = {"task": "e2e", "placement": "front", "text_format": {"prompt": " it's {source}:", "target": "{target}"}}
    prefix = dataclasses.replace(random_prefix(backbone, 5), header=header)
    facts = export_llama_cpp(prefix, backbone, tmp_path / "out", name="pubs", state_version=3)
    names = ["README.md", "ask.json", "check.py", "export.json", "placeholders.json", "pubs.bin", "pubs.blob"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert json.loads((tmp_path / "out/export.json").read_text()) == facts
    assert (facts["prefix_length"], facts["state_version"], facts["patched"]) == (5, 3, False)
    tokens = placeholders_for(prefix, backbone)
    assert (tmp_path / "out/pubs.bin").read_bytes() == encode_file(rows_of(prefix, backbone), tokens, version=3)
    asked = json.loads((tmp_path / "out/placeholders.json").read_text())
    assert (asked["prompt"], asked["n_predict"]) == (tokens, 0)
    asked = json.loads((tmp_path / "out/ask.json").read_text())
    assert (asked["prompt"], asked["id_slot"], asked["temperature"]) == ([*tokens, " it's ...:"], 0, 0)
    readme = (tmp_path / "out/README.md").read_text()
    assert '{"filename": "pubs.bin"}' in readme
    assert readme.count("-d @ask.json") == 1
    assert "--slot-save-path" in readme
    assert '-H "Authorization: Bearer $LLAMA_API_KEY"' in readme
    assert (tmp_path / "out/check.py").read_text() == Path(llama_cpp_check.__file__).read_text()


def test_a_patched_folder_has_no_blob(tiny_backbone: Make, random_prefix: Make, tmp_path: Path) -> None:
    backbone = tiny_backbone("qwen3")
    prefix, other = random_prefix(backbone, 5), random_prefix(backbone, 5, seed=1)
    tokens = placeholders_for(prefix, backbone)
    slot = tmp_path / "slot.bin"
    slot.write_bytes(encode_file(rows_of(other, backbone), tokens, version=3, kv_type="f32"))
    facts = export_llama_cpp(prefix, backbone, tmp_path / "out", slot_file=slot)
    assert (facts["state_version"], facts["kv_type"], facts["patched"]) == (3, "f32", True)
    wanted = encode_file(rows_of(prefix, backbone), tokens, version=3, kv_type="f32")
    assert (tmp_path / "out/prefix.bin").read_bytes() == wanted
    assert not (tmp_path / "out/prefix.blob").exists()
    with pytest.raises(CheckpointError, match="holds other tokens"):
        export_llama_cpp(other, backbone, tmp_path / "out", slot_file=slot)
    with pytest.raises(CheckpointError, match="cannot read the slot file"):
        export_llama_cpp(prefix, backbone, tmp_path / "out", slot_file=tmp_path / "nothing.bin")


@pytest.mark.parametrize("name", ["gpt_neox", "opt", "gemma"])
def test_model_types_that_were_not_compared_are_refused(
    name: str, tiny_backbone: Make, random_prefix: Make, tmp_path: Path
) -> None:
    backbone = tiny_backbone(name)
    with pytest.raises(BackboneError, match=r"never compared.*; compared were llama, mistral, qwen2, qwen3, gpt2"):
        export_llama_cpp(random_prefix(backbone, 3), backbone, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_refused(tiny_backbone: Make, random_prefix: Make, tmp_path: Path) -> None:
    backbone = dataclasses.replace(tiny_backbone("llama"), adapter=object())
    with pytest.raises(BackboneError, match="LoRA adapter"):
        export_llama_cpp(random_prefix(backbone, 3), backbone, tmp_path / "out")


# --- the check -------------------------------------------------------------------------------------------------------

FACTS = {
    "file": "prefix.bin",
    "prefix_length": 3,
    "placeholders": TOKENS,
    "text_format": {"prompt": " {source} <s>", "target": "{target}"},
}


class Server:
    """A fake llama-server, whose answers can be spoiled."""

    def __init__(self) -> None:
        self.restored, self.cached, self.spoiled, self.asked, self.key = 3, 3, "", [], ""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((self.path, body))
                wrong_key = outer.key and self.headers["Authorization"] != f"Bearer {outer.key}"
                code, answer = (401, {"error": "no"}) if wrong_key else outer.answer(self.path, body)
                data = json.dumps(answer).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        if "restore" in path:
            return (400, {"error": "no"}) if self.spoiled == "file" else (200, {"n_restored": self.restored})
        held = body["prompt"][:3] == TOKENS
        likely = -1.0 if held and body["cache_prompt"] else -2.0 if held else -3.0
        if self.spoiled == "tokens" and held:
            likely = -2.0
        if self.spoiled == "all":
            likely = -1.0
        token = 6 if self.spoiled == "far" and likely == -1.0 else 5
        probabilities = [{"top_logprobs": [{"id": token, "logprob": likely}]}]
        reply = {"timings": {"cache_n": self.cached if held else 0}}
        return 200, reply if self.spoiled == "probabilities" else {**reply, "completion_probabilities": probabilities}


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.thread.join()
    made.http.server_close()


def test_a_prefix_in_effect(server: Server) -> None:
    lines = check(server.url, FACTS, slot=2, text="hello", timeout=5.0)
    assert lines[0] == "n_restored 3, timings.cache_n 3"
    assert "differ by up to 1" in lines[1]
    assert "differ by up to 2" in lines[2]
    assert server.asked[0] == ("/slots/2?action=restore", {"filename": "prefix.bin"})
    assert [body["prompt"] for path, body in server.asked if path == "/completion"] == [
        [*TOKENS, "hello"],
        [*TOKENS, "hello"],
        ["hello"],
    ]
    # The slot is left with the prefix in it.
    assert server.asked[-1] == server.asked[0]


def test_other_tokens_altogether_are_a_difference(server: Server) -> None:
    server.spoiled = "far"
    lines = check(server.url, FACTS, timeout=5.0)
    assert lines[1] == "against the placeholders read as tokens: none of the likeliest first tokens are the same"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"restored": 2}, "n_restored is 2, but the prefix has 3 positions"),
        ({"cached": 2}, "cache_n is 2, but must be 3 or more"),
        ({"spoiled": "tokens"}, "as likely with the prefix as with the placeholders read as tokens"),
        ({"spoiled": "all"}, "it changes nothing"),
        ({"spoiled": "probabilities"}, "no probabilities"),
        ({"spoiled": "file"}, "answered 400"),
    ],
)
def test_a_prefix_that_is_not_in_effect(
    change: dict[str, Any], message: str, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in change.items():
        setattr(server, name, value)
    with pytest.raises(NotInEffectError, match=message):
        check(server.url, FACTS, timeout=5.0)
    (tmp_path / "export.json").write_text(json.dumps(FACTS))
    assert llama_cpp_check.main([server.url, "--export", str(tmp_path / "export.json")]) == 1
    assert "error: the prefix is not in effect" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "found"), [("", "got none"), ("another", "refuses this one")])
def test_a_server_with_a_key(
    given: str,
    found: str,
    server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server.key = "secret"
    (tmp_path / "export.json").write_text(json.dumps(FACTS))
    arguments = [server.url, "--export", str(tmp_path / "export.json")]
    monkeypatch.setenv("LLAMA_API_KEY", given)
    assert llama_cpp_check.main(arguments) == 1
    # Nothing was learned of the prefix.
    assert capsys.readouterr().err == (
        f"error: the server wants a key, and {found}: give --api-key or LLAMA_API_KEY.\n"
    )
    assert llama_cpp_check.main([*arguments, "--api-key", "secret"]) == 0
    monkeypatch.setenv("LLAMA_API_KEY", "secret")
    assert llama_cpp_check.main(arguments) == 0


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(NotInEffectError, match="cannot be reached"):
        check("http://127.0.0.1:9", FACTS, timeout=5.0)
