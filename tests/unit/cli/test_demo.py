"""The demo teaches two skills, and replaces an earlier demo alone."""

import pytest

from prefixtune.cli.main import main


def test_a_run_that_no_demo_made_is_kept(tmp_path):
    (tmp_path / "prefix.safetensors").write_bytes(b"precious")
    assert main(["demo", "--output", str(tmp_path), "--quiet"]) == 2
    assert (tmp_path / "prefix.safetensors").read_bytes() == b"precious"


def test_other_prefixes_that_are_served_with_its_own_stay(tmp_path, monkeypatch):
    (tmp_path / "demo.json").write_text("{}")
    (tmp_path / "prefixes").mkdir()
    (tmp_path / "prefixes" / "mine.safetensors").write_bytes(b"precious")
    for name in ("backbone.packaged.prepare", "backbone.load.load_backbone"):
        monkeypatch.setattr(f"prefixtune.{name}", lambda *given, **more: None)
    monkeypatch.setattr("prefixtune.training.train.train", lambda *given, **more: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["demo", "--output", str(tmp_path), "--quiet"])
    assert (tmp_path / "prefixes" / "mine.safetensors").read_bytes() == b"precious"
