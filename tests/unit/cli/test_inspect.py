"""`prefixtune inspect FOLDER`: what is listed, and what is said of broken files."""

import json
from pathlib import Path

import pytest
import torch

from prefixtune.backbone.prefixes import make_header
from prefixtune.cli.main import main
from prefixtune.prefix.prefix import Prefix, save_prefix
from prefixtune.training.artifact import save_weights


@pytest.fixture
def folder(tiny_backbone, random_prefix, save_random_prefix, tmp_path):
    """Two prefixes, a run with a third, and two broken files."""
    decoder, bart = tiny_backbone("llama"), tiny_backbone("bart")
    save_random_prefix(tmp_path / "pubs.safetensors", decoder, task="e2e")
    save_random_prefix(tmp_path / "news.safetensors", bart, {"encoder": 3, "cross": 5}, task="xsum")
    save_prefix(tmp_path / "run" / "prefix.safetensors", Prefix(random_prefix(decoder, 2).layers))
    (tmp_path / "run" / "state.safetensors").write_bytes(b"no prefix, and not meant to be one")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "pubs.safetensors").read_bytes()[:-7])
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    (tmp_path / "notes.txt").write_text("no prefix")
    return tmp_path


def test_a_folder_is_listed_and_broken_files_have_their_reason(folder, capsys):
    assert main(["inspect", str(folder), "--json"]) == 1
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["prefixes"]}
    assert list(rows) == sorted(rows)
    assert rows.keys() == {
        *("pubs.safetensors", "news.safetensors", "cut.safetensors", "loop.safetensors"),
        str(Path("run") / "prefix.safetensors"),
    }
    pubs = rows["pubs.safetensors"]
    assert pubs["file_bytes"] == (folder / "pubs.safetensors").stat().st_size
    assert (pubs["backbone"], pubs["prefix_length"], pubs["task"]) == ("tiny-llama", {"decoder": 4}, "e2e")
    assert rows["news.safetensors"]["prefix_length"] == {"encoder": 3, "cross": 5}
    assert rows[str(Path("run") / "prefix.safetensors")]["task"] is None
    assert {name for name, row in rows.items() if "error" in row} == {"cut.safetensors", "loop.safetensors"}
    assert "cut.safetensors" in rows["cut.safetensors"]["error"]


def test_runs_of_other_methods_are_listed(folder, tiny_backbone, capsys):
    header = make_header(tiny_backbone("llama"), task="records", method="bias")
    save_weights(folder / "tuned" / "weights.safetensors", {"a.bias": torch.zeros(5)}, header)
    (folder / "tuned" / "state.safetensors").write_bytes(b"the state")
    (folder / "teacher.safetensors").write_bytes(b"a teacher's labels")
    assert main(["inspect", str(folder), "--json"]) == 1
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["prefixes"]}
    tuned = rows[str(Path("tuned") / "weights.safetensors")]
    assert "teacher.safetensors" not in rows
    assert (tuned["method"], tuned["parameters"], tuned["backbone"]) == ("bias", 5, "tiny-llama")
    assert rows["pubs.safetensors"]["method"] == "prefix"
    assert main(["inspect", str(folder / "tuned")]) == 0
    (folder / "tuned" / "weights.safetensors").write_bytes(b"cut")
    assert main(["inspect", str(folder / "tuned")]) == 1


def test_a_folder_without_prefixes_is_refused(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
