"""Backbones are told apart without their weights, and alike on every machine."""

import shutil

from prefixtune.backbone.identity import backbone_identity, public_name
from prefixtune.backbone.packaged import DEFAULT_BACKBONE


def test_a_folder_is_the_same_wherever_it_lies_and_whether_or_not_it_has_weights(tmp_path, monkeypatch):
    first = tmp_path / "a" / "model"
    first.mkdir(parents=True)
    (first / "config.json").write_text("{}")
    identity = backbone_identity(str(first))
    assert len(bytes.fromhex(identity)) == 6
    shutil.copytree(first, tmp_path / "b" / "model")
    (tmp_path / "b" / "model" / "model.safetensors").write_bytes(b"weights")
    assert backbone_identity(str(tmp_path / "b" / "model") + "/") == identity
    monkeypatch.chdir(tmp_path / "b" / "model")
    assert backbone_identity(".") == identity

    (first / "config.json").write_text('{"hidden_size": 8}')
    shutil.copytree(tmp_path / "b" / "model", tmp_path / "b" / "other")
    others = [first, tmp_path / "b" / "other"]
    assert len({identity, *(backbone_identity(str(other)) for other in others)}) == 3


def test_an_embedded_backbone_and_a_hub_id_are_their_names(tmp_path, monkeypatch):
    identities = [backbone_identity(name) for name in (DEFAULT_BACKBONE, "org/model", "org/other")]
    assert len(set(identities)) == 3
    # The embedded one is used even where a folder has its name.
    monkeypatch.chdir(tmp_path)
    (tmp_path / DEFAULT_BACKBONE).mkdir()
    assert backbone_identity(DEFAULT_BACKBONE) == identities[0]


def test_a_name_for_others_is_no_path(tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny.gguf").touch()
    monkeypatch.chdir(tmp_path / "tiny")
    paths = [str(tmp_path / "tiny"), str(tmp_path / "tiny") + "/", "../tiny", ".", str(tmp_path / "tiny.gguf")]
    assert {public_name(path) for path in paths} == {"tiny"}
    assert public_name("/", "base") == "base"
    assert public_name("/") == "backbone"
    # Others load these by their names.
    assert [public_name(name, "base") for name in (DEFAULT_BACKBONE, "org/model")] == [DEFAULT_BACKBONE, "org/model"]
