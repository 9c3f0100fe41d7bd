"""The prefixes in a folder: found, followed when their files change, refused with a reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fake_vllm import save, vllm_config
from prefixtune.backbone.load import load_backbone
from prefixtune.errors import CheckpointError
from prefixtune.interop.vllm.folder import PrefixFolder
from prefixtune.interop.vllm.settings import Settings

Make = Callable[..., Any]


def test_a_prefix_is_found_and_read_again_when_its_file_changes(
    folder: PrefixFolder, model_folder: Path, random_prefix: Make
):
    first = folder.find("pubs")
    assert first is not None
    assert (first.reference.name, first.reference.length, first.description) == ("pubs", 5, "e2e")
    assert folder.find("pubs") is first, "an unchanged file is not read again"
    assert folder.find("trains") is None
    assert folder.find("../pubs") is None
    backbone = load_backbone(model_folder, dtype="float32", device="cpu")
    save(backbone, random_prefix(backbone, 7), folder.settings.prefixes / "pubs.safetensors", description="new")
    second = folder.find("pubs")
    assert second is not None
    assert (second.reference.length, second.description) == (7, "new")
    assert list(folder.all()) == ["pubs"]
    (folder.settings.prefixes / "pubs.safetensors").unlink()
    assert folder.find("pubs") is None
    assert folder.all() == {}


def test_files_that_are_not_served(folder: PrefixFolder, random_prefix: Make, tiny_backbone: Make):
    path = folder.settings.prefixes
    (path / "cut.safetensors").write_bytes((path / "pubs.safetensors").read_bytes()[:-9])
    wide = tiny_backbone("llama", num_hidden_layers=2)
    save(wide, random_prefix(wide, 3), path / "shallow.safetensors")
    (path / "link.safetensors").symlink_to("/etc/hostname")
    (path / "folder.safetensors").mkdir()
    for name in ("cut", "shallow", "link", "folder"):
        with pytest.raises(CheckpointError):
            folder.find(name)
    assert list(folder.all()) == ["pubs"]


def test_hub_ids_are_compared(folder: PrefixFolder, model_folder: Path, random_prefix: Make):
    def served(hub_id: str, **options: Any) -> set[str]:
        settings = Settings.from_vllm(vllm_config(folder.settings.prefixes, **options))
        return set(PrefixFolder(settings, folder.geometry, "tiny", hub_id=hub_id).all())

    backbone = load_backbone(model_folder, dtype="float32", device="cpu")
    for name, origin in (("base", "Qwen/Qwen3-4B"), ("tuned", "Qwen/Qwen3-4B-Instruct-2507"), ("local", "qwen")):
        path = folder.settings.prefixes / f"{name}.safetensors"
        save(dataclasses.replace(backbone, name=origin), random_prefix(backbone, 3), path)
    assert served("") == {"pubs", "base", "tuned", "local"}
    assert served("qwen/qwen3-4b") == {"pubs", "base", "local"}
    assert served("qwen/qwen3-4b", allow_other_backbone=True) == {"pubs", "base", "tuned", "local"}
