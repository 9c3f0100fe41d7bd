"""Sets of the `datasets` library: saved folders, the hub's columns of each task, class names, and what goes wrong.

The hub itself is never asked: `load_dataset` is replaced.
"""

import datasets
import pytest

from prefixtune.data import read_task
from prefixtune.errors import DataError

MR = "name[Aromi], eatType[pub]"
TRIPLE = "Aarhus | leaderName | Jacob_Bundsgaard"


def save(folder, rows, **more):
    """One split, as `save_to_disk` writes it."""
    datasets.Dataset.from_list(rows, **more).save_to_disk(str(folder))
    return folder


def save_splits(folder, **splits):
    parts = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    datasets.DatasetDict(parts).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize(
    ("task", "rows", "source", "targets"),
    [
        (
            "e2e",
            [{"meaning_representation": MR, "human_reference": text} for text in ("One.", "Two.")],
            "name : Aromi | Type : pub",
            ("One.", "Two."),
        ),
        (
            "webnlg",
            [
                {
                    "category": "Artist",
                    "modified_triple_sets": {"mtriple_set": [[TRIPLE, TRIPLE]]},
                    "lex": {
                        "comment": ["good", "toFix", "good"],
                        "text": ["One.", "x", "Two."],
                        "lid": ["1", "2", "3"],
                    },
                }
            ],
            " | Aarhus : leaderName : Jacob_Bundsgaard" * 2,
            ("One.", "Two."),
        ),
        (
            "webnlg",
            [{"category": "Artist", "input": [TRIPLE], "target": "One.", "references": ["One.", "Two."]}],
            " | Aarhus : leaderName : Jacob_Bundsgaard",
            ("One.", "Two."),
        ),
        (
            "dart",
            [
                {
                    "tripleset": [["A", "TITLE", "B"], ["A", "Year", "C"]],
                    "annotations": {"source": ["e2e", "e2e"], "text": ["One.", "Two."]},
                }
            ],
            "A : title : B | A : year : C",
            ("One.", "Two."),
        ),
        ("summarization", [{"document": "It rained.\n", "summary": "Rain.", "id": "1"}], "It rained.", ("Rain.",)),
        ("scitldr", [{"source": ["We", "learn."], "target": ["A.", "B."], "paper_id": "1"}], "We learn.", ("A.", "B.")),
    ],
)
def test_the_hubs_columns(tmp_path, task, rows, source, targets):
    (example,) = read_task(task, save(tmp_path / "set", rows))
    assert (example.source, example.targets) == (source, targets)
    if task == "webnlg":
        assert (example.groups["category"], example.groups["seen"]) == ("Artist", "unseen")
    if task == "dart":
        assert example.groups["source"] == "e2e"


def test_ones_own_columns_and_class_names(tmp_path):
    rows = save(tmp_path / "rows", [{"q": "x", "a": ["y", "z"]}])
    assert read_task("records", rows, source="{q}!", target="a")[0].targets == ("y", "z")

    classes = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"text": datasets.Value("string"), "label": classes})
    labelled = save(tmp_path / "labels", [{"text": "Fine.", "label": 1}], features=features)
    assert read_task("classification", labelled)[0].targets == ("good",)

    tags = datasets.Sequence(datasets.ClassLabel(names=["O", "B-TRAIN", "I-TRAIN"]))
    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("string")), "ner_tags": tags})
    tagged = save(tmp_path / "tags", [{"tokens": ["Grey", "Wolf"], "ner_tags": [1, 2]}], features=features)
    assert read_task("tagging", tagged, target="ner_tags")[0].targets == ("B-TRAIN I-TRAIN",)


def test_a_set_whose_form_is_recognized(tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    folder = save_splits(tmp_path / "set", train=[{"messages": turns}], validation=[{"messages": turns * 2}])
    (example,) = read_task("records", folder, split="dev", needs_targets=True)
    assert (example.source, example.targets, len(example.messages)) == ("Hi", ("Hello.",), 3)
    wrong = save(tmp_path / "wrong", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}])
    with pytest.raises(DataError, match="wrong, row 2: 'completion'"):
        read_task("records", wrong, needs_targets=True)


def test_images_and_sounds_of_unused_columns_are_not_decoded(tmp_path):
    # Decoding would fail: there is no such image, and no program for sounds here.
    damaged = {"bytes": b"\xffno image", "path": "a.png"}
    row = {"prompt": "Hi", "completion": "Hello.", "photo": damaged, "sound": damaged, "photos": [damaged] * 2}
    data = datasets.Dataset.from_list([{**row, "scan": {"page": damaged, "size": "[1]"}, "facts": '{"size": 1}'}])
    media = {
        "photo": datasets.Image(),
        "sound": datasets.Audio(),
        "photos": datasets.List(datasets.Image()),
        "scan": {"page": datasets.Image(), "size": datasets.Json()},
        "facts": datasets.Json(),
    }
    data.cast(datasets.Features({**data.features, **media})).save_to_disk(str(tmp_path / "set"))
    (example,) = read_task("records", tmp_path / "set")
    assert (example.source, example.targets) == ("Hi", ("Hello.",))
    assert example.fields["facts"] == {"size": 1}
    assert example.fields["scan"]["size"] == [1]


def test_splits(tmp_path):
    rows = {
        name: [{"document": f"{name}.", "summary": f"{name}!"}] for name in ("train", "validation", "test_seen", "test")
    }
    folder = save_splits(tmp_path / "set", **rows)
    for split, name in (("train", "train"), ("dev", "validation"), ("test", "test")):
        assert read_task("summarization", folder, split=split)[0].source == f"{name}."
    assert read_task("summarization", folder / "test_seen")[0].source == "test_seen."
    assert read_task("summarization", folder / "test_seen", split="dev")[0].source == "test_seen."
    with pytest.raises(DataError, match="train, validation, test_seen, test"):
        read_task("summarization", folder)
    only = save_splits(tmp_path / "only", extra=rows["train"])
    assert read_task("summarization", only)[0].source == "train."
    with pytest.raises(DataError, match="it has: extra"):
        read_task("summarization", only, split="dev")


def test_a_wrong_row_or_set_is_named(tmp_path):
    folder = save(tmp_path / "set", [{"document": "x", "summary": "y"}, {"document": None, "summary": "y"}])
    with pytest.raises(DataError, match="row 2"):
        read_task("summarization", folder)
    unlabelled = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a"])})
    with pytest.raises(DataError, match="row 1"):
        read_task("classification", save(tmp_path / "no", [{"text": "x", "label": -1}], features=unlabelled))
    (arrow,) = folder.glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:50])
    with pytest.raises(DataError, match="set"):
        read_task("summarization", folder)


@pytest.fixture
def asked(monkeypatch):
    """What the hub was asked for: name, configuration, split and revision. It has a set of two splits."""
    calls = []

    def check(name, revision):
        if name == "GEM/e2e_nlg" and revision != "refs/convert/parquet":
            raise RuntimeError("Dataset scripts are no longer supported, but found e2e_nlg.py")
        if name not in ("GEM/xsum", "GEM/e2e_nlg"):
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset {name!r} doesn't exist.\nMore.")

    def names(name, configuration, revision=None):
        check(name, revision)
        return ["train", "validation"] if name == "GEM/xsum" else ["train"]

    def load(name, configuration, split, revision, streaming):
        calls.append((name, configuration, split, revision))
        check(name, revision)
        row = {"mr": MR, "ref": "One."} if name == "GEM/e2e_nlg" else {"document": f"{split}.", "summary": "x"}
        return datasets.Dataset.from_list([row]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "get_dataset_split_names", names)
    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


def test_the_hub_is_asked_only_where_it_is_named(tmp_path, asked):
    assert read_task("summarization", "hub:GEM/xsum", split="dev")[0].source == "validation."
    assert read_task("summarization", "hub:GEM/xsum:small@train")[0].source == "train."
    # Only the split that is read is loaded, once.
    assert asked == [("GEM/xsum", None, "validation", None), ("GEM/xsum", "small", "train", None)]
    assert read_task("summarization", "hub:GEM/xsum:small#v1.0", split="dev")[0].source == "validation."
    assert asked[-1] == ("GEM/xsum", "small", "validation", "v1.0")
    assert read_task("records", "hub:GEM/xsum@train#v1.0")[0].targets == ("x",)
    assert asked[-1] == ("GEM/xsum", None, "train", "v1.0")
    count = len(asked)
    with pytest.raises(DataError):
        read_task("summarization", "GEM/xsum", split="dev")
    assert len(asked) == count


def test_a_set_that_is_a_script_has_a_way_out(asked):
    with pytest.raises(DataError, match="hub:GEM/e2e_nlg"):
        read_task("e2e", "hub:GEM/e2e_nlg@train")
    for path in ("hub:GEM/e2e_nlg#refs/convert/parquet", "hub:GEM/e2e_nlg@train#refs/convert/parquet"):
        assert read_task("e2e", path, split="train")[0].targets == ("One.",)
    assert asked[-1] == ("GEM/e2e_nlg", None, "train", "refs/convert/parquet")


@pytest.mark.parametrize(
    ("path", "split"), [("hub:GEM/xsum", "test"), ("hub:GEM/xsum@tset", None), ("hub:GEM/xsumm", "test")]
)
def test_what_the_hub_has_not(asked, path, split):
    with pytest.raises(DataError):
        read_task("summarization", path, split=split)
