"""The folder of prefixes: names, changes on the disk, uploads and deletions."""

import os
import threading

import pytest
import torch

from prefixtune.backbone.prefixes import PrefixValidator
from prefixtune.errors import CheckpointError, PrefixError
from prefixtune.server.prefixes import PrefixFolder
from prefixtune.utils.locks import FolderBusyError, change_folder

NAN = b"\x00\x00\xc0\x7f"


def test_a_file_that_is_overwritten_in_place_does_not_change_a_loaded_prefix(tmp_path, save, llama):
    path = save("p", 1)
    held = PrefixFolder(tmp_path, llama).get("p")
    before = [tensor.clone() for tensor in held.tensors()]
    # Were the tensors mapped from the file, cutting it short would end this process.
    with open(path, "r+b") as handle:
        handle.truncate(0)
    assert all(torch.equal(a, b) for a, b in zip(before, held.tensors(), strict=True))


def test_a_prefix_in_memory_outlasts_a_file_that_is_being_replaced_or_is_bad(tmp_path, save, llama):
    path = save("p", 1)
    store = PrefixFolder(tmp_path, llama)
    held, whole = store.get("p"), save("new", 2, folder=tmp_path / "elsewhere").read_bytes()
    # The header of the last one is good.
    for content in (whole[:100], whole[:-10], b"junk", whole[:-4] + NAN):
        path.write_bytes(content)
        assert store.get("p") is held
        assert (store.num_stale, list(store.refused), store.names()) == (1, ["p"], ["p"])
    path.write_bytes(whole)
    assert store.get("p") is not held
    assert store.num_stale == 0
    path.unlink()
    with pytest.raises(PrefixError):
        store.get("p")


def test_a_prefix_in_memory_outlasts_a_disk_that_fails(tmp_path, save, llama, monkeypatch):
    save("p", 1), save("q", 2)
    store = PrefixFolder(tmp_path, llama)

    def load(*names):
        return store.load({name: store.file(name) for name in names})

    held, joined = load("p"), load("p", "q")
    save("p", 3)

    def fail(*_, **__):
        raise CheckpointError("no", hint="none") from OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(PrefixValidator, "load", fail)
        assert load("p") is held
        assert load("p", "q") is joined
        with pytest.raises(PrefixError):
            load("q", "p")
        # Somebody else's new file is not read, and what was theirs is not given for it.
        save("p", 4, job={"id": "ftjob-1", "owner": "alice"})
        with pytest.raises(PrefixError):
            load("p")
        # One that is deleted after it was looked at is no more.
        save("p", 5)
        file = store.file("p")
        (tmp_path / "p.safetensors").unlink()
        with pytest.raises(PrefixError):
            store.load({"p": file})
        save("p", 3)
    assert load("p") is not held
    assert load("p", "q") is not joined


def test_a_bad_file_of_another_owner_ends_the_prefix_in_memory(tmp_path, save, llama):
    def job(owner):
        return {"id": "ftjob-1", "owner": owner}

    path = save("p", 1, job=job("alice"))
    store = PrefixFolder(tmp_path, llama)
    store.get("p")
    path.write_bytes(save("p", 2, folder=tmp_path / "elsewhere", job=job("bob")).read_bytes()[:-4] + NAN)
    with pytest.raises(PrefixError):
        store.get("p")
    assert (store.num_stale, store.names()) == (0, [])


def test_a_slow_file_delays_no_other(tmp_path, save, llama, monkeypatch):
    save("slow"), save("quick")
    store, go_on, load = PrefixFolder(tmp_path, llama), threading.Event(), PrefixValidator.load

    def wait(self, path, name, **options):
        assert name != "slow" or go_on.wait(10)
        return load(self, path, name, **options)

    monkeypatch.setattr(PrefixValidator, "load", wait)
    slow = [threading.Thread(target=store.get, args=("slow",)) for _ in range(6)]
    for thread in slow:
        thread.start()
    quick = threading.Thread(target=store.get, args=("quick",), daemon=True)
    quick.start()
    quick.join(5)
    assert not quick.is_alive()
    go_on.set()
    for thread in slow:
        thread.join()
    assert (store.num_loaded, store.misses, store.hits) == (2, 2, 5)


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
            with pytest.raises(FolderBusyError, match=r"for 0\.1 seconds"):
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
