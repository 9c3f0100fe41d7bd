"""WebNLG: the linearization, the challenge's XML, JSON lines, seen and unseen, and the error for a wrong file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import pytest

from data_files import write
from prefixtune.data import TASKS, read_task
from prefixtune.data.tasks.webnlg import linearize, read_webnlg
from prefixtune.errors import ConfigError, DataError

AIRPORT = ["Aarhus_Airport", "cityServed", '"Aarhus, Denmark"']
LEADER = ["Aarhus", "leaderName", "Jacob_Bundsgaard"]


def entry(triples: list[list[str]], texts: list[tuple[str, str]], category: str = "Airport", eid: str = "Id1") -> str:
    """An entry as the challenge writes it."""
    inner = "".join(f"<mtriple>{escape(' | '.join(triple))}</mtriple>" for triple in triples)
    original = inner.replace("mtriple", "otriple").replace("cityServed", "originalName")
    lex = "".join(f'<lex comment="{comment}" lid="Id1">{escape(text)}</lex>\n' for comment, text in texts)
    return (
        f'<entry category={quoteattr(category)} eid="{eid}" size="{len(triples)}">\n'
        f"<originaltripleset>{original}</originaltripleset>\n<modifiedtripleset>\n{inner}\n</modifiedtripleset>\n"
        f"{lex}</entry>\n"
    )


def benchmark(*entries: str) -> str:
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<benchmark>\n<entries>\n{"".join(entries)}</entries></benchmark>\n'


def test_linearization_is_the_authors():
    assert linearize([("A", "cityServed", "B"), ("A", "country", "C")]) == " | A : cityServed : B | A : country : C"


@pytest.mark.parametrize("name", ["a.xml", "a.xml.gz"])
def test_the_challenges_xml(tmp_path: Path, name: str):
    texts = [("good", "Aarhus  &\n serves."), ("toFix", "Aarhs."), ("good", " “It” serves Århus. "), ("good", " ")]
    path = write(
        tmp_path / name,
        benchmark(entry([AIRPORT, LEADER], texts), entry([LEADER], [("toFix", "x")], "Food"), entry([LEADER], [])),
    )
    first, second = read_webnlg(path)
    assert first.source == (
        ' | Aarhus_Airport : cityServed : "Aarhus, Denmark" | Aarhus : leaderName : Jacob_Bundsgaard'
    )
    assert first.targets == ("Aarhus  & serves.", "“It” serves Århus.")
    assert first.groups == {"triples": "2", "category": "Airport"}
    assert (first.fields["eid"], first.fields["triples"]) == ("Id1", [AIRPORT, LEADER])
    # The second has no good text and is left out; the third has none at all, and is there to generate for.
    assert (second.source, second.targets) == (" | Aarhus : leaderName : Jacob_Bundsgaard", ())


def test_json_lines_give_the_same_as_xml(tmp_path: Path):
    rows: list[dict[str, Any]] = [
        {"category": "Airport", "triples": [AIRPORT], "references": ["One.", "Two."], "comments": ["good", "toFix"]},
        {"category": "Artist", "triples": [LEADER, AIRPORT], "references": ["Three."]},
    ]
    lines = write(tmp_path / "a.jsonl.gz", "\n".join(map(json.dumps, rows)))
    xml = write(
        tmp_path / "a.xml",
        benchmark(
            entry([AIRPORT], [("good", "One."), ("toFix", "Two.")]),
            entry([LEADER, AIRPORT], [("", "Three.")], "Artist"),
        ),
    )
    from_lines, from_xml = read_webnlg(lines), read_webnlg(xml)
    assert from_lines == from_xml
    assert [example.targets for example in from_xml] == [("One.",), ("Three.",)]
    assert [example.groups for example in from_lines] == [example.groups for example in from_xml]
    assert [example.groups["seen"] for example in from_xml] == ["seen", "unseen"]
    assert [example.fields["seen"] for example in from_xml] == [True, False]


def test_a_set_of_seen_categories_only_is_not_split_by_them(tmp_path: Path):
    row = {"category": "Food", "triples": [LEADER], "references": ["x"]}
    path = write(tmp_path / "a.jsonl", json.dumps(row))
    assert "seen" not in read_webnlg(path)[0].groups
    # Of a later release, whose training set has other categories.
    rows = [{**row, "category": category} for category in ("Airport", "Artist", "Company")]
    write(path, "\n".join(json.dumps(one) for one in rows))
    assert all("seen" not in example.groups for example in read_webnlg(path))
    write(path, json.dumps({**row, "seen": False}))
    assert read_webnlg(path)[0].groups["seen"] == "unseen"
    write(path, json.dumps({"triples": [LEADER], "references": ["x"]}))
    assert read_webnlg(path)[0].groups == {"triples": "1"}


def test_the_releases_folders(tmp_path: Path):
    for part, text in (("train", "Train"), ("dev", "Dev")):
        for number in (2, 1):
            name = f"{part}/{number}triples/{number}triples_Airport_{part}.xml"
            write(tmp_path / name, benchmark(entry([LEADER] * number, [("good", f"{text} {number}.")])))
    write(tmp_path / "test/testdata_with_lex.xml", benchmark(entry([LEADER], [("good", "Test.")], "Artist")))
    write(tmp_path / "test/testdata_no_lex.xml", benchmark(entry([LEADER], [], "Artist")))

    def texts(split: str | None, folder: Path = tmp_path) -> list[str]:
        return [example.targets[0] for example in read_task("webnlg", folder, split=split)]

    assert texts("train") == texts(None, tmp_path / "train") == ["Train 1.", "Train 2."]
    assert texts("dev") == ["Dev 1.", "Dev 2."]
    assert texts("test") == ["Test."]
    with pytest.raises(DataError, match=r"is a folder; .*has: train, dev, test"):
        read_task("webnlg", tmp_path)
    with pytest.raises(ConfigError, match="must be one of train, dev, test"):
        read_task("webnlg", tmp_path, split="validation")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"without \.xml files"):
        read_task("webnlg", tmp_path / "empty")


def test_texts_in_several_languages_are_refused(tmp_path: Path):
    # As the Russian release of 2020 has them.
    text = benchmark(entry([LEADER], [("good", "One."), ("good", "Два.")]))
    both = text.replace("<lex", '<lex lang="en"', 1).replace("<lex comment", '<lex lang="ru" comment', 1)
    with pytest.raises(
        DataError, match=r"entry 1: this text has the language 'ru', but those before it 'en'"
    ) as caught:
        read_webnlg(write(tmp_path / "both.xml", both))
    assert '<lex lang="ru">' in caught.value.hint
    for language in ("ru", ""):
        same = write(tmp_path / "one.xml", text.replace("<lex", f'<lex lang="{language}"'))
        assert read_webnlg(same)[0].targets == ("One.", "Два.")


GOOD = entry([LEADER], [("good", "x")])


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.xml", benchmark(GOOD)[:-40], "not XML: no element found: line 9"),
        ("a.xml", benchmark(GOOD).replace("UTF-8", "none"), "not XML: unknown encoding"),
        ("a.xml", benchmark(entry([["a", "b"]], [("good", "x")])), r"entry 1: triple 'a \| b' has 2 parts"),
        ("a.xml", benchmark(entry([LEADER], [("toFix", "x")])), "has no text whose comment is 'good'"),
        ("a.jsonl", '{"triple": []}', "line 1: there is no column 'triples'; there are: triple"),
        ("a.jsonl", '{"triples": [["a", "b"]]}', "triple 1 of 'triples'"),
        ("a.jsonl", '{"triples": [["a", "b", "c"]], "references": ["x"], "comments": []}', "for each of the 1"),
        ("a.jsonl", '{"triples": [["a", "b", "c"]], "references": ["x"], "seen": "no"}', "'seen'"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(tmp_path: Path, name: str, text: str, says: str):
    path = write(tmp_path / name, text)
    with pytest.raises(DataError, match=says) as caught:
        read_webnlg(path)
    assert str(path) in str(caught.value)
    assert caught.value.hint


def test_an_entity_from_outside_is_never_opened(tmp_path: Path):
    secret = write(tmp_path / "secret.txt", "secret")
    text = f'<!DOCTYPE x [<!ENTITY out SYSTEM "{secret.as_uri()}">]><benchmark><entry>&out;</entry></benchmark>'
    with pytest.raises(DataError, match="undefined entity"):
        read_webnlg(write(tmp_path / "a.xml", text))


def test_the_task_decodes_and_scores_as_the_paper_does(tmp_path: Path):
    task = TASKS["webnlg"]
    assert task.decoding == TASKS["e2e"].decoding
    assert (task.metrics, task.protocol) == (("bleu", "meteor", "ter"), "webnlg")
    path = write(tmp_path / "a.xml", benchmark(entry([LEADER], [("good", "x")], "Artist")))
    (example,) = read_task("webnlg", path, split="test")
    assert set(example.groups) == set(task.groups)
    with pytest.raises(ConfigError, match="takes no source"):
        read_task("webnlg", path, target="x")
    with pytest.raises(ConfigError, match="there is no task ''"):
        read_task("", path)


@pytest.mark.parametrize(
    ("part", "entries", "good", "left_out"), [("train", 6940, 18102 - 77, 5), ("dev", 872, 2268 - 10, 1)]
)
def test_the_training_and_development_sets(shared_data: Path, part: str, entries: int, good: int, left_out: int):
    examples = read_task("webnlg", shared_data / "webnlg2017", split=part)
    assert len(examples) == entries - left_out
    assert sum(len(example.targets) for example in examples) == good
    assert all("seen" not in example.groups for example in examples)


def test_the_test_set(shared_data: Path):
    examples = read_task("webnlg", shared_data / "webnlg2017", split="test")
    assert len(examples) == 1862
    assert sum(len(example.targets) for example in examples) == 4928
    assert Counter(example.groups["seen"] for example in examples) == {"seen": 971, "unseen": 891}
    assert Counter(example.groups["category"] for example in examples)["Artist"] == 213
    assert {example.groups["triples"] for example in examples} == set("1234567")
