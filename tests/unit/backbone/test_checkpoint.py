"""Where a checkpoint's files are."""

import pytest

from prefixtune.backbone.checkpoint import checkpoint_folder, reading
from prefixtune.errors import BackboneError


def test_a_model_of_the_hub_is_brought_to_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(tmp_path / name))
    assert checkpoint_folder("owner/name") == tmp_path / "owner" / "name"
    (tmp_path / "config.json").write_text("{}")
    assert checkpoint_folder(str(tmp_path)) == tmp_path

    def unreachable(name, **_):
        raise FileNotFoundError(name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(BackboneError):
        checkpoint_folder("owner/name")


def test_any_error_of_a_library_is_one_of_the_backbone():
    # tokenizers, of a file that is newer than itself.
    with pytest.raises(BackboneError), reading("x"):
        raise Exception("data did not match any variant")
