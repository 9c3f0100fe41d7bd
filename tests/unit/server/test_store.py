"""The folder of prefixes: names, changes on the disk, uploads and deletions."""

import os
import threading

import pytest
import torch

from prefixtune.engine.engine import Engine
from prefixtune.engine.request import Request, SamplingParams
from prefixtune.errors import RequestError
from prefixtune.prefix.folder import FolderBusyError, change_folder
from prefixtune.server.prefixes import PrefixFolder


def seed_of(prefix, llama, random_prefix):
    return next(n for n in range(20) if prefix.equal(random_prefix(llama, prefix.prefix_length, n).detach()))


def test_names_headers_and_prefixes(tmp_path, save, llama, random_prefix):
    for index, name in enumerate(["e2e", "Web-NLG_2.final"]):
        save(name, index, task="toy", description=f"number {index}")
    (tmp_path / "notes.txt").write_text("not a prefix")
    (tmp_path / ".hidden.safetensors").write_text("not for anyone")
    store = PrefixFolder(tmp_path, llama)
    assert store.names() == ["Web-NLG_2.final", "e2e"]
    assert store.file("other") is None
    assert store.file("e2e").header["description"] == "number 0"
    assert store.refused == {}
    assert store.num_loaded == 0, "the folder was looked through without reading tensors"
    prefix = store.get("Web-NLG_2.final")
    assert seed_of(prefix, llama, random_prefix) == 1
    assert prefix.header["task"] == "toy"
    assert store.get("Web-NLG_2.final") is prefix
    assert (store.hits, store.misses, store.num_bytes) == (1, 1, prefix.num_bytes)


def test_a_replaced_file_counts_for_new_requests_only(tmp_path, save, llama, random_prefix):
    save("p", 1)
    store = PrefixFolder(tmp_path, llama)
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


def test_a_file_that_is_overwritten_in_place_does_not_change_a_loaded_prefix(tmp_path, save, llama):
    path = save("p", 1)
    held = PrefixFolder(tmp_path, llama).get("p")
    before = [tensor.clone() for tensor in held.tensors()]
    # Were the tensors mapped from the file, cutting it short would end this process.
    with open(path, "r+b") as handle:
        handle.truncate(0)
    assert all(torch.equal(a, b) for a, b in zip(before, held.tensors(), strict=True))


def test_names_that_could_lead_out_of_the_folder_are_refused(tmp_path, save, llama):
    (tmp_path / "inside").mkdir()
    save("p")
    store = PrefixFolder(tmp_path / "inside", llama)
    source = tmp_path / "p.safetensors"
    names = ("", ".", "..", ".p", "../p", "a/b", "/etc/passwd", "a\\b", "a b", "é", "p\n", "p\0", "x" * 129)
    for use in (store.get, store.delete, lambda name: store.put(name, source)):
        for name in names:
            with pytest.raises(RequestError):
                use(name)
    assert list((tmp_path / "inside").iterdir()) == []
    assert source.exists()


def test_links_out_of_the_folder_are_refused(tmp_path, save, llama):
    folder = tmp_path / "inside"
    save("real", 1, folder=folder)
    (folder / "good.safetensors").symlink_to("real.safetensors")
    (folder / "bad.safetensors").symlink_to(save("outside"))
    (folder / "nowhere.safetensors").symlink_to(folder / "missing")
    (folder / "itself.safetensors").symlink_to("itself.safetensors")
    (folder / "folder.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    store = PrefixFolder(folder, llama)
    assert store.names() == ["good", "real"]
    assert store.refused.keys() >= {"bad", "itself", "folder", "pipe"}
    store.get("good")


def test_the_folder_is_changed_by_one_at_a_time(tmp_path, save, llama, monkeypatch):
    monkeypatch.setattr("prefixtune.server.prefixes._LOCK_SECONDS", 0.1)
    store = PrefixFolder(tmp_path / "store", llama)
    store.put("p", save("upload", 1))
    before = (store.folder / "p.safetensors").read_bytes()
    with change_folder(store.folder, 1.0):
        for change in (lambda: store.put("p", save("upload", 2)), lambda: store.delete("p")):
            with pytest.raises(FolderBusyError, match="changing the folder of prefixes for"):
                change()
        assert store.get("p") is not None
    assert (store.folder / "p.safetensors").read_bytes() == before
    store.put("p", save("upload", 2))
    (store.folder / "bad.safetensors").write_text("junk")
    for name in ("p", "bad"):
        store.delete(name)
    assert list(store.folder.iterdir()) == []


def test_the_cache_is_bounded_and_drops_the_least_recently_used(tmp_path, save, llama):
    for name in "abcd":
        save(name)
    one = PrefixFolder(tmp_path, llama).get("a").num_bytes
    store = PrefixFolder(tmp_path, llama, max_bytes=2 * one + one // 2)
    first = store.get("a")
    store.get("b")
    assert store.get("a") is first
    store.get("c")
    assert (store.num_loaded, store.num_bytes) == (2, 2 * one)
    assert store.get("a") is first, "b had been unused for longer"
    misses = store.misses
    store.get("b")
    assert store.misses == misses + 1


def test_a_prefix_larger_than_the_cache_is_refused(tmp_path, save, llama):
    save("small", length=1)
    save("large", length=50)
    store = PrefixFolder(tmp_path, llama, max_bytes=2000)
    assert store.names() == ["small"]
    assert "bytes" in store.refused["large"]


def test_many_threads_at_once(tmp_path, save, llama):
    for index in range(8):
        save(f"p{index}", index)
    spare = save("spare", 9, folder=tmp_path / "elsewhere")
    one = PrefixFolder(tmp_path, llama).get("p0").num_bytes
    store = PrefixFolder(tmp_path, llama, max_bytes=3 * one)
    errors = []

    def request_prefixes(thread):
        try:
            for turn in range(25):
                name = f"p{(thread * 7 + turn) % 8}"
                if thread == 0 and turn % 5 == 0:
                    store.put("p0", spare)
                if thread == 1 and turn % 5 == 0:
                    store.names()
                assert store.get(name).prefix_length == 3
                assert store.num_bytes <= 3 * one
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=request_prefixes, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(store.names()) == 8
