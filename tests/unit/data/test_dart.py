"""DART: the linearization, the release's JSON and XML, JSON lines, official references, and wrong files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_files import write
from prefixtune.data import TASKS, read_task
from prefixtune.data.tasks.dart import linearize, read_dart
from prefixtune.errors import ConfigError, DataError

JOINED = ["Mars Hill College", "JOINED", "1973"]
PLACE = ["Mars Hill College", "LOCATION", "Mars Hill, North Carolina"]
SOURCE = "Mars Hill College : joined : 1973 | Mars Hill College : location : Mars Hill, North Carolina"


def release(*annotations: tuple[str, str], triples: Any = (JOINED, PLACE)) -> dict[str, Any]:
    """An entry of the release's JSON."""
    return {
        "tripleset": list(triples),
        "subtree_was_extended": False,
        "annotations": [{"source": source, "text": text} for source, text in annotations],
    }


def test_linearization_is_the_authors():
    assert linearize([("A", "[TITLE]", "B C"), ("A", "Year Won", "")]) == "A : [title] : B C | A : year won : "


def test_the_releases_json(tmp_path: Path):
    entries = [
        release(("WikiSQL_lily", " One,\ntwo. "), ("WikiSQL_lily", "Three.")),
        release(("webnlg", " "), ("e2e", "Four.")),
        release(("webnlg", "")),
        release(("webnlg", "Five."), ("e2e", "Six.")),
    ]
    path = write(tmp_path / "dart-v1.1.1-full-train.json", json.dumps(entries, indent=1))
    examples = read_dart(path)
    # The third has no text; equal triples stay apart.
    assert [example.targets for example in examples] == [("One, two.", "Three."), ("Four.",), ("Five.", "Six.")]
    assert {example.source for example in examples} == {SOURCE}
    assert [example.groups for example in examples] == [
        {"triples": "2", "source": "WikiSQL_lily"},
        {"triples": "2", "source": "e2e"},
        {"triples": "2"},
    ]
    assert examples[0].fields["triples"] == [JOINED, PLACE]
    assert examples[0].fields["subtree_was_extended"] is False
    assert read_task("dart", tmp_path, split="train") == examples


def test_json_lines_and_xml_give_the_same(tmp_path: Path):
    row = {"triples": [JOINED, PLACE], "references": ["One."], "sources": ["webnlg"]}
    official = {**row, "official_references_3": ["one .", "", ""]}
    lines = write(tmp_path / "a.jsonl", json.dumps(official))
    xml = write(
        tmp_path / "a.xml",
        '<benchmark><entries><entry category="MISC" eid="Id1" size="2"><modifiedtripleset>'
        f"<mtriple>{' | '.join(JOINED)}</mtriple><mtriple>{' | '.join(PLACE)}</mtriple></modifiedtripleset>"
        '<lex comment="webnlg" lid="Id1">One.</lex><lex comment="webnlg" lid="Id2"></lex>'
        "</entry></entries></benchmark>",
    )
    (from_lines,), (from_xml,) = read_dart(lines), read_dart(xml)
    assert from_lines == from_xml
    assert from_lines.groups == from_xml.groups == {"triples": "2", "source": "webnlg"}
    assert from_lines.fields["official_references"] == ("one .", "", "")
    assert "official_references" not in from_xml.fields


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.json", json.dumps([release(("e2e", " "))]), "has no text"),
        ("a.json", json.dumps([release(("e2e", "x")), release()]), "item 2: 'annotations'"),
        ("a.json", json.dumps([release(("e2e", "x"), triples=[["a", "b", None]])]), "triple 1"),
        ("a.jsonl", '{"text": "x"}', "line 1: there is no column 'triples'"),
        ("a.jsonl", '{"triples": [["a", "b", "c"]], "references": ["x"], "sources": "y"}', "'sources'"),
    ],
)
def test_a_wrong_file_is_named_with_its_entry(tmp_path: Path, name: str, text: str, says: str):
    path = write(tmp_path / name, text)
    with pytest.raises(DataError, match=says) as caught:
        read_dart(path)
    assert str(path) in str(caught.value)
    assert caught.value.hint


def test_the_task_decodes_and_scores_as_the_paper_does(tmp_path: Path):
    task = TASKS["dart"]
    assert task.decoding == TASKS["e2e"].decoding
    assert (task.metrics, task.protocol, task.groups) == (("bleu", "meteor", "ter"), "dart", ("triples", "source"))
    with pytest.raises(ConfigError, match="takes no source"):
        read_task("dart", tmp_path / "a.json", source="x")


@pytest.mark.parametrize(("part", "entries", "references"), [("dev", 2768, 6980), ("test", 5097, 12551)])
def test_the_whole_set(shared_data: Path, part: str, entries: int, references: int):
    examples = read_task("dart", shared_data / "dart", split=part)
    assert len(examples) == entries
    assert sum(len(example.targets) for example in examples) == references
    for example in examples:
        assert "\n" not in example.source
        assert all(target and "\n" not in target for target in example.targets)
        assert "source" in example.groups
        assert len(example.fields.get("official_references", ())) == (3 if part == "test" else 0)
