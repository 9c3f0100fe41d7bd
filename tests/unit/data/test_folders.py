"""The sets made here, and folders with a training, development and test set."""

import gzip
import hashlib
import json

import pytest

from prefixtune.data import TASKS, read_task
from prefixtune.errors import ConfigError, DataError


def mr(name):
    return json.dumps({"mr": f"name[{name}]", "references": [f"{name}."]})


def csv(name):
    return f"mr,ref\nname[{name}],{name}.\n"


def sources(folder, split):
    return [example.source for example in read_task("e2e", folder, split=split)]


def test_the_releases_names(tmp_path):
    for name in ("trainset.csv", "devset.csv", "testset_w_refs.csv"):
        (tmp_path / name).write_text(csv(name[:3]))
    (tmp_path / "testset.csv").write_text("MR\nname[other]\n")
    assert sources(tmp_path, "train") == ["name : tra"]
    assert sources(tmp_path, "dev") == ["name : dev"]
    assert sources(tmp_path, "test") == ["name : tes"]
    (tmp_path / "testset_w_refs.csv").unlink()
    assert sources(tmp_path, "test") == ["name : other"]


@pytest.mark.parametrize("name", ["dev.jsonl", "validation.jsonl", "valid.jsonl.gz", "val.jsonl"])
def test_plain_names(tmp_path, name):
    data = mr("x").encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    (tmp_path / "devset.csv").write_text(csv("y"))
    assert sources(tmp_path, "dev") == ["name : x"]


def test_a_missing_split_is_reported_with_the_names_that_were_tried(tmp_path):
    (tmp_path / "devset.csv").write_text(csv("y"))
    with pytest.raises(DataError, match=r"testset_w_refs\.csv.*has: dev"):
        sources(tmp_path, "test")
    (tmp_path / "devset.csv").rename(tmp_path / "mine.csv")
    with pytest.raises(DataError, match="train"):
        sources(tmp_path, "train")


def test_a_folder_needs_a_split(tmp_path):
    (tmp_path / "train.jsonl").write_text(mr("x"))
    (tmp_path / "devset.csv").write_text(csv("y"))
    with pytest.raises(DataError, match="has: train, dev"):
        sources(tmp_path, None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="folder"):
        sources(tmp_path / "empty", None)


def test_a_file_is_read_whole_whatever_the_split(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(mr("x"))
    assert sources(path, "test") == sources(path, None) == ["name : x"]
    with pytest.raises(DataError, match="does not exist"):
        sources(tmp_path / "other.jsonl", "dev")
    with pytest.raises(ConfigError, match="mean 'test'"):
        sources(path, "tets")


def test_a_toy_set_is_not_a_folder(tmp_path, monkeypatch):
    (tmp_path / "train").mkdir()
    monkeypatch.chdir(tmp_path)
    assert read_task("toy", "train", split="train") == read_task("toy", "train")


def test_a_set_made_here_has_parts_and_no_columns():
    for options in ({"path": "heldout"}, {"path": "train", "source": "x"}):
        with pytest.raises(ConfigError):
            read_task("toy", **options)


def test_the_toy_set_never_changes_and_its_parts_are_disjoint():
    parts = [read_task("toy", part) for part in TASKS["toy"].parts]
    assert [len(part) for part in parts] == [320, 40]
    examples = [example for part in parts for example in part]
    assert len({example.source for example in examples}) == 360
    text = "\n".join("\t".join((example.source, *example.targets)) for example in examples)
    assert hashlib.sha256(text.encode()).hexdigest().startswith("32229c73f84b50f5")
