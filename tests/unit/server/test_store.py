"""The folder of prefixes: what is served, what is refused and why, and a cache that stays within its bounds."""

from __future__ import annotations

import json
import os
import shutil
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefixtune.backbone.prefixes import make_header
from prefixtune.engine.engine import Engine
from prefixtune.engine.request import Request, SamplingParams
from prefixtune.errors import CheckpointError, PrefixError, RequestError
from prefixtune.prefix.artifact import save_prefix
from prefixtune.prefix.prefix import Head, Prefix
from prefixtune.server.models.store import PrefixStore


@pytest.fixture(scope="module")
def llama(tiny_backbone: Callable[..., Any]) -> Any:
    return tiny_backbone("llama")


@pytest.fixture
def save(tmp_path: Path, llama: Any, random_prefix: Callable[..., Any]) -> Callable[..., Path]:
    """A factory: `save(name, seed, **facts)` writes a prefix into the folder."""

    def write(name: str, seed: int = 0, *, length: int = 3, folder: Path = tmp_path, **facts: Any) -> Path:
        made = random_prefix(llama, length, seed)
        return save_prefix(folder / f"{name}.safetensors", Prefix(made.layers, make_header(llama, **facts)))

    return write


def seed_of(prefix: Prefix, llama: Any, random_prefix: Callable[..., Any]) -> int:
    return next(n for n in range(20) if prefix.equal(random_prefix(llama, prefix.prefix_length, n).detach()))


# --- what is served --------------------------------------------------------------------------------------------------


def test_names_headers_and_prefixes(tmp_path: Path, save: Any, llama: Any, random_prefix: Any):
    for number, name in enumerate(["e2e", "Web-NLG_2.final"]):
        save(name, number, task="toy", description=f"number {number}")
    (tmp_path / "notes.txt").write_text("not a prefix")
    (tmp_path / ".hidden.safetensors").write_text("not for anyone")
    store = PrefixStore(tmp_path, llama)
    assert store.names() == ["Web-NLG_2.final", "e2e"]
    assert ("e2e" in store, "other" in store, len(store)) == (True, False, 2)
    assert store.header("e2e")["description"] == "number 0"
    assert store.refused == {}
    assert store.stats.loaded == 0, "the folder was looked through without reading tensors"
    prefix = store.get("Web-NLG_2.final")
    assert seed_of(prefix, llama, random_prefix) == 1
    assert prefix.header["task"] == "toy"
    assert store.get("Web-NLG_2.final") is prefix
    assert (store.stats.hits, store.stats.misses, store.stats.bytes) == (1, 1, prefix.num_bytes)


def test_an_empty_folder_is_made(tmp_path: Path, llama: Any):
    store = PrefixStore(tmp_path / "to" / "be" / "made", llama)
    assert store.names() == []
    with pytest.raises(RequestError, match="there is no prefix 'x'"):
        store.get("x")


def test_reload_finds_what_changed(tmp_path: Path, save: Any, llama: Any, random_prefix: Any):
    save("goes")
    save("stays")
    store = PrefixStore(tmp_path, llama)
    held = store.get("stays")
    (tmp_path / "goes.safetensors").unlink()
    save("comes", 5)
    assert "comes" not in store
    store.reload()
    assert store.names() == ["comes", "stays"]
    assert store.get("stays") is held
    assert seed_of(store.get("comes"), llama, random_prefix) == 5
    with pytest.raises(RequestError):
        store.get("goes")


def test_a_file_that_is_gone_is_gone_at_once(tmp_path: Path, save: Any, llama: Any):
    path = save("p")
    store = PrefixStore(tmp_path, llama)
    store.get("p")
    path.unlink()
    with pytest.raises(RequestError):
        store.get("p")
    assert (store.names(), store.stats.bytes) == ([], 0)


def test_a_replaced_file_counts_for_new_requests_only(tmp_path: Path, save: Any, llama: Any, random_prefix: Any):
    save("p", 1)
    store = PrefixStore(tmp_path, llama)
    sampling = SamplingParams(max_new_tokens=8, min_new_tokens=8)
    old = store.get("p")
    (alone,) = Engine(llama).run([Request((1, 2, 3), old, sampling)])[0]
    engine = Engine(llama)
    engine.add(Request((1, 2, 3), store.get("p"), sampling, id="old"))
    outputs = engine.step()
    save("p", 2)
    new = store.get("p")
    assert new is not old
    assert seed_of(new, llama, random_prefix) == 2
    assert seed_of(old, llama, random_prefix) == 1
    engine.add(Request((1, 2, 3), new, sampling, id="new"))
    while engine.busy:
        outputs += engine.step()
    written = {name: [t for o in outputs if o.request_id == name for t in o.tokens] for name in ("old", "new")}
    assert written["old"] == list(alone.tokens)
    assert written["new"] != written["old"]


def test_a_file_that_is_overwritten_in_place_does_not_reach_who_has_it(tmp_path: Path, save: Any, llama: Any):
    path = save("p", 1)
    held = PrefixStore(tmp_path, llama).get("p")
    before = [tensor.clone() for tensor in held.tensors()]
    # Were the tensors mapped from the file, cutting it short would end this process.
    with open(path, "r+b") as handle:
        handle.truncate(0)
    assert all(torch.equal(a, b) for a, b in zip(before, held.tensors(), strict=True))


# --- the cache -------------------------------------------------------------------------------------------------------


def test_the_cache_keeps_to_its_bytes_and_drops_the_longest_unused(tmp_path: Path, save: Any, llama: Any):
    for name in "abcd":
        save(name)
    one = PrefixStore(tmp_path, llama).get("a").num_bytes
    store = PrefixStore(tmp_path, llama, max_bytes=2 * one + one // 2)
    first = store.get("a")
    store.get("b")
    assert store.get("a") is first
    store.get("c")
    assert (store.stats.evictions, store.stats.loaded, store.stats.bytes) == (1, 2, 2 * one)
    assert store.get("a") is first, "b had been unused for longer"
    misses = store.stats.misses
    store.get("b")
    assert store.stats.misses == misses + 1


def test_a_prefix_larger_than_the_cache_is_refused(tmp_path: Path, save: Any, llama: Any):
    save("small", length=1)
    save("large", length=50)
    store = PrefixStore(tmp_path, llama, max_bytes=2000)
    assert store.names() == ["small"]
    assert "bytes" in store.refused["large"]


def test_thousands_of_files_and_a_small_cache(tmp_path: Path, save: Any, llama: Any):
    original = save("n0000", length=1)
    for number in range(1, 2000):
        os.link(original, tmp_path / f"n{number:04}.safetensors")
    began = time.monotonic()
    one = PrefixStore(tmp_path, llama, max_bytes=2**20)
    seconds = time.monotonic() - began
    # 0.4 s were measured with one thread.
    assert seconds < 8
    assert len(one.names()) == 2000
    size = one.get("n0000").num_bytes
    store = PrefixStore(tmp_path, llama, max_bytes=20 * size)
    for number in range(0, 2000, 10):
        store.get(f"n{number:04}")
        assert store.stats.bytes <= 20 * size
    assert (store.stats.evictions, store.stats.loaded, store.stats.known) == (180, 20, 2000)
    began = time.monotonic()
    store.reload()
    # Nothing changed: no file is read.
    assert time.monotonic() - began < 4


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".p", "../p", "a/b", "/etc/passwd", "a\\b", "a b", "é", "p\n", "p\0", "x" * 129]
)
def test_names_that_could_lead_elsewhere_are_no_names(name: str, tmp_path: Path, save: Any, llama: Any):
    (tmp_path / "inside").mkdir()
    save("p")
    store = PrefixStore(tmp_path / "inside", llama)
    source = tmp_path / "p.safetensors"
    for use in (store.get, store.header, store.delete, lambda given: store.put(given, source)):
        with pytest.raises(RequestError) as error:
            use(name)
        assert str(tmp_path) not in str(error.value)
    assert list((tmp_path / "inside").iterdir()) == []
    assert source.exists()


@pytest.mark.parametrize("name", ["x" * 128, "-", "_a", "1.0", "a..b"])
def test_names_that_are_allowed(name: str, tmp_path: Path, save: Any, llama: Any):
    store = PrefixStore(tmp_path / "inside", llama)
    store.put(name, save("p"))
    assert store.names() == [name]
    store.get(name)


def test_links_out_of_the_folder_are_refused(tmp_path: Path, save: Any, llama: Any):
    folder = tmp_path / "inside"
    save("real", 1, folder=folder)
    (folder / "good.safetensors").symlink_to("real.safetensors")
    (folder / "bad.safetensors").symlink_to(save("outside"))
    (folder / "nowhere.safetensors").symlink_to(folder / "missing")
    (folder / "itself.safetensors").symlink_to("itself.safetensors")
    (folder / "folder.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    store = PrefixStore(folder, llama)
    assert store.names() == ["good", "real"]
    assert "leads out" in store.refused["bad"]
    assert "cannot be read" in store.refused["itself"]
    assert "ordinary" in store.refused["folder"]
    assert "ordinary" in store.refused["pipe"]
    store.get("good")


def test_prefixes_of_another_use_are_refused_with_the_reason(
    tmp_path: Path, save: Any, llama: Any, random_prefix: Any, tiny_backbone: Any
):
    save("good")
    save("lora", adapter="adapter")
    save("labels", labels={"kind": "classification", "by": "words", "names": ["a"], "words": ["b"]})
    save("infix", placement="infix")
    made = random_prefix(llama, 2)
    head = Head(torch.zeros(2, llama.hidden_size), torch.zeros(2))
    save_prefix(tmp_path / "head.safetensors", Prefix(made.layers, make_header(llama), head))
    other = tiny_backbone("gpt2")
    save_prefix(tmp_path / "shapes.safetensors", Prefix(random_prefix(other, 2).layers, make_header(other)))
    sister = tiny_backbone("llama", seed=1)
    save_prefix(tmp_path / "sister.safetensors", Prefix(made.layers, make_header(sister)))
    store = PrefixStore(tmp_path, llama)
    assert store.names() == ["good"]
    told = {
        "lora": "LoRA",
        "labels": "classifies",
        "head": "classifies",
        "infix": "infix",
        "shapes": "shapes",
        "sister": "other weights",
    }
    assert store.refused.keys() == told.keys()
    for name, word in told.items():
        assert word in store.refused[name]
        with pytest.raises(CheckpointError, match=word):
            store.get(name)
    allowed = PrefixStore(tmp_path, llama, allow_other_backbone=True)
    assert allowed.names() == ["good", "sister"]
    allowed.get("sister")


def hostile(path: Path, header: bytes, body: bytes = b"", length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + body)


def tensors(shape: object, dtype: str = "F32", offsets: object = (0, 0), metadata: object = None) -> bytes:
    facts: dict[str, object] = {"decoder.0.key": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}
    facts["__metadata__"] = {"prefixtune": "{}"} if metadata is None else metadata
    return json.dumps(facts).encode()


@pytest.mark.parametrize(
    ("header", "body", "length"),
    [
        (b"", b"", None),
        (b"{}", b"", 2**63),
        (b"{}", b"", 100),
        (b"not JSON", b"", None),
        (b"[]", b"", None),
        (b"[" * 100_000, b"", None),
        (b'{"__metadata__": {}}', b"", None),
        (tensors([2, 3, 8], metadata={"prefixtune": "[]"}), b"", None),
        (tensors([2, 3, 8], metadata={"prefixtune": '{"a": NaN}'}), bytes(192), None),
        (tensors([2, 3, 8], metadata={"prefixtune": 5}), b"", None),
        (tensors([2, 3, 8], metadata=[]), b"", None),
        (tensors([2, 3, 8]), bytes(100), None),
        (tensors([10**9, 10**9, 10**9]), b"", None),
        (tensors([-1, -1, 8]), bytes(32), None),
        (tensors([float("inf"), 1, 1]), b"", None),
        (tensors("abc"), b"", None),
        (tensors([2, 3, 8], dtype="I64"), bytes(384), None),
        (tensors([2, 3, 8], offsets=[0, 192]), bytes(192), None),
    ],
)
def test_hostile_files_are_left_out_and_told(
    header: bytes, body: bytes, length: int | None, tmp_path: Path, save: Any, llama: Any
):
    save("good")
    hostile(tmp_path / "bad.safetensors", header, body, length)
    store = PrefixStore(tmp_path, llama)
    assert store.names() == ["good"]
    assert store.refused["bad"]
    assert str(tmp_path) not in store.refused["bad"]
    with pytest.raises(CheckpointError) as error:
        store.get("bad")
    assert str(tmp_path) not in str(error.value)
    with pytest.raises(CheckpointError):
        store.put("new", tmp_path / "bad.safetensors")
    store.get("good")


@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_damaged_files_never_come_through(data: st.DataObject, tmp_path: Path, save: Any, llama: Any):
    path = save("p", length=1)
    whole = bytearray(path.read_bytes())
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    if data.draw(st.booleans()):
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    else:
        place = data.draw(st.integers(0, start - 1))
        whole[place] = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[place]))
        path.write_bytes(whole)
    store = PrefixStore(tmp_path, llama)
    try:
        prefix = store.get("p")
    except (CheckpointError, RequestError):
        return
    # A changed letter within the header's words may pass; shapes and numbers are right all the same.
    assert prefix.geometry == {"decoder": llama.geometry["decoder"]}
    assert prefix.is_finite()


def test_what_only_a_whole_check_finds_is_refused_when_first_asked_for(tmp_path: Path, save: Any, llama: Any):
    path = save("p")
    whole = bytearray(path.read_bytes())
    whole[-4:] = struct.pack("<f", float("nan"))
    path.write_bytes(whole)
    store = PrefixStore(tmp_path, llama)
    assert store.names() == ["p"]
    with pytest.raises(CheckpointError, match="damaged") as error:
        store.get("p")
    assert str(tmp_path) not in str(error.value)
    assert "prefixtune-" not in str(error.value)
    assert (store.names(), list(store.refused)) == ([], ["p"])
    store.reload()
    assert list(store.refused) == ["p"]
    save("p", 3)
    store.get("p")
    assert (store.names(), store.refused) == (["p"], {})


def test_numbers_that_the_backbones_dtype_cannot_hold(tmp_path: Path, tiny_models: Any, tiny_tokenizer: Any):
    from prefixtune.backbone.backbone import Backbone

    half = Backbone.from_model(tiny_models("llama").half(), tiny_tokenizer, "half")
    layers = tuple((torch.full((2, 1, 8), 1e6), torch.zeros(2, 1, 8)) for _ in range(3))
    save_prefix(tmp_path / "p.safetensors", Prefix({"decoder": layers}))
    with pytest.raises(CheckpointError, match="float16"):
        PrefixStore(tmp_path, half).get("p")


def test_a_disk_that_fails_for_a_moment_refuses_nothing(
    tmp_path: Path, save: Any, llama: Any, monkeypatch: pytest.MonkeyPatch
):
    save("p")
    store = PrefixStore(tmp_path, llama)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", fail)
        with pytest.raises(PrefixError, match="Too many open files"):
            store.get("p")
    assert store.refused == {}
    store.get("p")


# --- putting and deleting --------------------------------------------------------------------------------------------


def test_put_takes_a_file_in_and_replaces(tmp_path: Path, save: Any, llama: Any, random_prefix: Any):
    store = PrefixStore(tmp_path / "store", llama)
    source = save("upload", 1)
    store.put("p", source)
    assert source.exists()
    assert seed_of(store.get("p"), llama, random_prefix) == 1
    store.put("p", save("upload", 2))
    assert seed_of(store.get("p"), llama, random_prefix) == 2
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["p.safetensors"]


def test_put_refuses_what_does_not_fit_and_changes_nothing(
    tmp_path: Path, save: Any, llama: Any, random_prefix: Any, tiny_backbone: Any
):
    folder = tmp_path / "store"
    save("p", 1, folder=folder)
    store = PrefixStore(folder, llama)
    before = (folder / "p.safetensors").read_bytes()
    other = tiny_backbone("gpt2")
    wrong = save_prefix(tmp_path / "w.safetensors", Prefix(random_prefix(other, 2).layers, make_header(other)))
    nan = save("nan")
    nan.write_bytes(nan.read_bytes()[:-4] + struct.pack("<f", float("nan")))
    for source in (wrong, nan, save("lora", adapter="x")):
        with pytest.raises(CheckpointError, match="not accepted") as error:
            store.put("p", source)
        assert str(tmp_path) not in str(error.value)
    with pytest.raises(PrefixError):
        store.put("p", tmp_path / "missing")
    assert [path.name for path in folder.iterdir()] == ["p.safetensors"]
    assert (folder / "p.safetensors").read_bytes() == before
    assert seed_of(store.get("p"), llama, random_prefix) == 1


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, save: Any, llama: Any, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "store"
    save("p", 1, folder=folder)
    store = PrefixStore(folder, llama)
    before = (folder / "p.safetensors").read_bytes()

    def half(source: Any, target: Any) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:50])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", half)
    with pytest.raises(PrefixError, match="No space left") as error:
        store.put("p", save("upload", 2))
    assert str(tmp_path) not in str(error.value)
    assert (folder / "p.safetensors").read_bytes() == before
    assert [path.name for path in folder.iterdir()] == ["p.safetensors"]


def test_delete_removes_the_file_and_leaves_who_has_it(tmp_path: Path, save: Any, llama: Any):
    save("p")
    (tmp_path / "bad.safetensors").write_text("junk")
    store = PrefixStore(tmp_path, llama)
    held = store.get("p")
    store.delete("p")
    store.delete("bad")
    assert held.is_finite()
    assert (store.names(), store.refused, store.stats.bytes, list(tmp_path.iterdir())) == ([], {}, 0, [])
    with pytest.raises(RequestError):
        store.delete("p")


def test_many_threads_at_once(tmp_path: Path, save: Any, llama: Any):
    for number in range(8):
        save(f"p{number}", number)
    spare = save("spare", 9, folder=tmp_path / "elsewhere")
    one = PrefixStore(tmp_path, llama).get("p0").num_bytes
    store = PrefixStore(tmp_path, llama, max_bytes=3 * one)
    wrong: list[BaseException] = []

    def ask(thread: int) -> None:
        try:
            for turn in range(25):
                name = f"p{(thread * 7 + turn) % 8}"
                if thread == 0 and turn % 5 == 0:
                    store.put("p0", spare)
                if thread == 1 and turn % 5 == 0:
                    store.reload()
                assert store.get(name).prefix_length == 3
                assert store.stats.bytes <= 3 * one
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(store.names()) == 8


def test_many_who_ask_for_one_prefix_read_it_once(tmp_path: Path, save: Any, llama: Any):
    save("p")
    store = PrefixStore(tmp_path, llama)
    found: list[Prefix] = []
    threads = [threading.Thread(target=lambda: found.append(store.get("p"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(prefix) for prefix in found}) == 1
    assert (store.stats.misses, store.stats.hits) == (1, 7)
