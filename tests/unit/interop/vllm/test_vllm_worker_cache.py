"""A worker's prefixes: its own heads, in a cache of bounded size, and files that cannot be used."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fake_vllm import save
from prefixtune.backbone.load import load_backbone
from prefixtune.errors import CheckpointError
from prefixtune.interop.vllm import worker_cache
from prefixtune.interop.vllm.folder import PrefixFolder
from prefixtune.interop.vllm.reference import PrefixPart, PrefixReference
from prefixtune.interop.vllm.settings import Settings
from prefixtune.interop.vllm.worker_cache import WorkerCache
from prefixtune.prefix.prefix import read_artifact

Make = Callable[..., Any]


def make_cache(folder: PrefixFolder, heads: slice = slice(0, 1)) -> WorkerCache:
    return WorkerCache(folder.settings, folder.geometry["decoder"], heads, torch.device("cpu"), torch.bfloat16)


def reference_of(folder: PrefixFolder, name: str) -> PrefixReference:
    prefix = folder.find(name)
    assert prefix is not None
    return prefix.reference


def test_a_worker_gets_its_own_heads(folder: PrefixFolder):
    pairs = make_cache(folder).get(reference_of(folder, "pubs"))
    stored = read_artifact(folder.settings.prefixes / "pubs.safetensors").layers["decoder"]
    assert len(pairs) == len(stored)
    for pair, tensors in zip(pairs, stored, strict=True):
        for part, tensor in zip(pair, tensors, strict=True):
            assert torch.equal(part, tensor[:1].transpose(0, 1).to(torch.bfloat16))


def test_prefixes_used_last_are_kept(
    folder: PrefixFolder, model_folder: Path, random_prefix: Make, monkeypatch: pytest.MonkeyPatch
):
    backbone = load_backbone(model_folder, dtype="float32", device="cpu")
    for name in ("trains", "ships"):
        save(backbone, random_prefix(backbone, 5), folder.settings.prefixes / f"{name}.safetensors")
    reads: list[str] = []

    def read(path: Path) -> Any:
        reads.append(path.name)
        return read_artifact(path)

    monkeypatch.setattr(worker_cache, "read_artifact", read)
    cache = make_cache(folder)
    pairs = cache.get(reference_of(folder, "pubs"))
    size = sum(part.numel() * part.element_size() for pair in pairs for part in pair)
    # Room for two.
    monkeypatch.setattr(Settings, "cache_bytes", 2 * size)
    for name, num_reads in (("trains", 2), ("pubs", 2), ("ships", 3), ("pubs", 3), ("trains", 4)):
        cache.get(PrefixReference((PrefixPart(name, version_of(folder, name), 5),)))
        assert len(reads) == num_reads, name


def version_of(folder: PrefixFolder, name: str) -> tuple[int, int]:
    version = worker_cache.version_of(folder.settings.prefixes / f"{name}.safetensors")
    assert version is not None
    return version


def test_a_file_that_was_replaced_is_not_used(folder: PrefixFolder):
    reference = reference_of(folder, "pubs")
    path = folder.settings.prefixes / "pubs.safetensors"
    shutil.copyfile(path, path.with_name("copy"))
    path.with_name("copy").replace(path)
    with pytest.raises(CheckpointError, match="replaced"):
        make_cache(folder).get(reference)


def test_a_broken_file_is_read_once(folder: PrefixFolder, monkeypatch: pytest.MonkeyPatch):
    path = folder.settings.prefixes / "pubs.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-4:] = b"\xff\xff\xff\xff"
    path.write_bytes(raw)
    cache, reference = make_cache(folder, slice(0, 2)), reference_of(folder, "pubs")
    with pytest.raises(CheckpointError) as first:
        cache.get(reference)
    monkeypatch.setattr(worker_cache, "read_artifact", None)
    with pytest.raises(CheckpointError) as second:
        cache.get(reference)
    assert second.value.message == first.value.message
    assert "the file of 'pubs'" in second.value.message


def test_a_copy_that_cannot_be_read_now_is_read_again(folder: PrefixFolder, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    cache, reference = make_cache(folder), reference_of(folder, "pubs")
    with monkeypatch.context() as patched:
        patched.setattr("prefixtune.prefix.file.open", fail, raising=False)
        with pytest.raises(CheckpointError, match="'pubs' cannot be read now"):
            cache.get(reference)
    assert len(cache.get(reference)) == len(folder.geometry["decoder"])
