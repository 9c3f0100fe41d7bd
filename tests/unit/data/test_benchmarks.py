"""E2E, WebNLG and DART: linearizations, the files of the releases, groups, and what is left out or refused."""

import json
from collections import Counter
from xml.sax.saxutils import escape, quoteattr

import pytest

from data_files import write
from prefixtune.data import TASKS, files, read_task
from prefixtune.data.benchmarks import linearize_dart, linearize_e2e, linearize_webnlg, parse_mr
from prefixtune.errors import ConfigError, DataError

AIRPORT = ["Aarhus_Airport", "cityServed", '"Aarhus, Denmark"']
LEADER = ["Aarhus", "leaderName", "Jacob_Bundsgaard"]
JOINED = ["Mars Hill College", "JOINED", "1973"]
PLACE = ["Mars Hill College", "LOCATION", "Mars Hill, North Carolina"]


def entry(triples, texts, category="Airport", eid="Id1"):
    """An entry as the challenge writes it."""
    inner = "".join(f"<mtriple>{escape(' | '.join(triple))}</mtriple>" for triple in triples)
    original = inner.replace("mtriple", "otriple").replace("cityServed", "originalName")
    lex = "".join(f'<lex comment="{comment}" lid="Id1">{escape(text)}</lex>\n' for comment, text in texts)
    return (
        f'<entry category={quoteattr(category)} eid="{eid}" size="{len(triples)}">\n'
        f"<originaltripleset>{original}</originaltripleset>\n<modifiedtripleset>\n{inner}\n</modifiedtripleset>\n"
        f"{lex}</entry>\n"
    )


def benchmark(*entries):
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<benchmark>\n<entries>\n{"".join(entries)}</entries></benchmark>\n'


def release(*annotations, triples=(JOINED, PLACE)):
    """An entry of DART's JSON."""
    return {
        "tripleset": list(triples),
        "subtree_was_extended": False,
        "annotations": [{"source": source, "text": text} for source, text in annotations],
    }


def test_linearizations_are_the_authors():
    assert linearize_webnlg([("A", "cityServed", "B"), ("A", "country", "C")]) == (
        " | A : cityServed : B | A : country : C"
    )
    assert linearize_dart([("A", "[TITLE]", "B C"), ("A", "Year Won", "")]) == "A : [title] : B C | A : year won : "
    every = (
        "name[The Vaults], eatType[pub], food[Fast food], priceRange[more than £30], customer rating[5 out of 5], "
        "area[riverside], familyFriendly[yes], near[Café Adriatic]"
    )
    assert linearize_e2e(every) == (
        "name : The Vaults | Type : pub | food : Fast food | price : more than £30 | customer rating : 5 out of 5 | "
        "area : riverside | family friendly : yes | near : Café Adriatic"
    )


# --- WebNLG ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.xml", "a.xml.gz"])
def test_the_challenges_xml(tmp_path, name):
    texts = [("good", "Aarhus  &\n serves."), ("toFix", "Aarhs."), ("good", " “It” serves Århus. "), ("good", " ")]
    path = write(
        tmp_path / name,
        benchmark(entry([AIRPORT, LEADER], texts), entry([LEADER], [("toFix", "x")], "Food"), entry([LEADER], [])),
    )
    first, second = read_task("webnlg", path)
    assert first.source == (
        ' | Aarhus_Airport : cityServed : "Aarhus, Denmark" | Aarhus : leaderName : Jacob_Bundsgaard'
    )
    assert first.targets == ("Aarhus  & serves.", "“It” serves Århus.")
    assert first.groups == {"triples": "2", "category": "Airport"}
    assert (first.fields["eid"], first.fields["triples"]) == ("Id1", (tuple(AIRPORT), tuple(LEADER)))
    # The second has no good text and is left out; the third has none at all, and is there to generate for.
    assert (second.source, second.targets) == (" | Aarhus : leaderName : Jacob_Bundsgaard", ())


def test_json_lines_give_the_same_as_xml(tmp_path):
    rows = [
        {"category": "Airport", "triples": [AIRPORT], "references": ["One."]},
        {"category": "Artist", "triples": [LEADER, AIRPORT], "references": ["Three."]},
    ]
    lines = write(tmp_path / "a.jsonl.gz", "\n".join(map(json.dumps, rows)))
    entries = (
        entry([AIRPORT], [("good", "One."), ("toFix", "Two.")]),
        entry([LEADER, AIRPORT], [("", "Three.")], "Artist"),
    )
    from_lines, from_xml = (
        read_task("webnlg", lines),
        read_task("webnlg", write(tmp_path / "a.xml", benchmark(*entries))),
    )
    assert from_lines == from_xml
    assert [example.targets for example in from_xml] == [("One.",), ("Three.",)]
    assert [example.groups for example in from_lines] == [example.groups for example in from_xml]
    assert [example.groups["seen"] for example in from_xml] == ["seen", "unseen"]
    assert [example.fields["seen"] for example in from_xml] == [True, False]


def test_a_set_of_seen_categories_only_is_not_split_by_them(tmp_path):
    row = {"category": "Food", "triples": [LEADER], "references": ["x"]}
    # The last ones are of a later release, whose training set has other categories.
    for categories in (["Food"], ["Airport", "Artist", "Company"]):
        rows = [{**row, "category": category} for category in categories]
        path = write(tmp_path / "a.jsonl", "\n".join(json.dumps(one) for one in rows))
        assert all("seen" not in example.groups for example in read_task("webnlg", path))
    write(path, json.dumps({**row, "seen": False}))
    assert read_task("webnlg", path)[0].groups["seen"] == "unseen"
    write(path, json.dumps({"triples": [LEADER], "references": ["x"]}))
    assert read_task("webnlg", path)[0].groups == {"triples": "1"}


def test_the_releases_folders(tmp_path):
    for part, text in (("train", "Train"), ("dev", "Dev")):
        for number in (2, 1):
            name = f"{part}/{number}triples/{number}triples_Airport_{part}.xml"
            write(tmp_path / name, benchmark(entry([LEADER] * number, [("good", f"{text} {number}.")])))
    write(tmp_path / "test/testdata_with_lex.xml", benchmark(entry([LEADER], [("good", "Test.")], "Artist")))
    write(tmp_path / "test/testdata_no_lex.xml", benchmark(entry([LEADER], [], "Artist")))

    def texts(split, folder=tmp_path):
        return [example.targets[0] for example in read_task("webnlg", folder, split=split)]

    assert texts("train") == texts(None, tmp_path / "train") == ["Train 1.", "Train 2."]
    assert texts("dev") == ["Dev 1.", "Dev 2."]
    assert texts("test") == ["Test."]
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path, tmp_path / "empty"):
        with pytest.raises(DataError, match="folder"):
            read_task("webnlg", folder)


def test_texts_in_several_languages_are_refused(tmp_path):
    # As the Russian release of 2020 has them.
    text = benchmark(entry([LEADER], [("good", "One."), ("good", "Два.")]))
    both = text.replace("<lex", '<lex lang="en"', 1).replace("<lex comment", '<lex lang="ru" comment', 1)
    with pytest.raises(DataError, match=r"both\.xml, entry 1"):
        read_task("webnlg", write(tmp_path / "both.xml", both))
    for language in ("ru", ""):
        same = write(tmp_path / "one.xml", text.replace("<lex", f'<lex lang="{language}"'))
        assert read_task("webnlg", same)[0].targets == ("One.", "Два.")


def test_an_entity_from_outside_is_never_opened_and_xml_has_a_bound(tmp_path, monkeypatch):
    secret = write(tmp_path / "secret.txt", "secret")
    text = f'<!DOCTYPE x [<!ENTITY out SYSTEM "{secret.as_uri()}">]><benchmark><entry>&out;</entry></benchmark>'
    with pytest.raises(DataError, match="undefined entity"):
        read_task("webnlg", write(tmp_path / "a.xml", text))
    monkeypatch.setattr(files, "MAX_XML_BYTES", 100)
    with pytest.raises(DataError, match=r"b\.xml\.gz"):
        read_task("webnlg", write(tmp_path / "b.xml.gz", benchmark(entry([LEADER], [("good", "x")]))))


# --- DART ------------------------------------------------------------------------------------------------------------


def test_the_releases_json(tmp_path):
    entries = [
        release(("WikiSQL_lily", " One,\ntwo. "), ("WikiSQL_lily", "Three.")),
        release(("webnlg", " "), ("e2e", "Four.")),
        release(("webnlg", "")),
        release(("webnlg", "Five."), ("e2e", "Six.")),
    ]
    path = write(tmp_path / "dart-v1.1.1-full-train.json", json.dumps(entries, indent=1))
    examples = read_task("dart", path)
    # The third has no text; equal triples stay apart.
    assert [example.targets for example in examples] == [("One, two.", "Three."), ("Four.",), ("Five.", "Six.")]
    assert {example.source for example in examples} == {
        "Mars Hill College : joined : 1973 | Mars Hill College : location : Mars Hill, North Carolina"
    }
    assert [example.groups.get("source") for example in examples] == ["WikiSQL_lily", "e2e", None]
    assert examples[0].fields["subtree_was_extended"] is False
    assert read_task("dart", tmp_path, split="train") == examples


def test_darts_json_lines_and_xml_give_the_same(tmp_path):
    row = {"triples": [JOINED, PLACE], "references": ["One."], "sources": ["webnlg"]}
    official = {**row, "official_references_3": ["one .", "", ""]}
    lines = write(tmp_path / "a.jsonl", json.dumps(official))
    xml = write(tmp_path / "a.xml", benchmark(entry([JOINED, PLACE], [("webnlg", "One."), ("webnlg", "")], "MISC")))
    (from_lines,), (from_xml,) = read_task("dart", lines), read_task("dart", xml)
    assert from_lines == from_xml
    assert from_lines.groups == from_xml.groups == {"triples": "2", "source": "webnlg"}
    assert from_lines.fields["official_references"] == ["one .", "", ""]
    assert "official_references" not in from_xml.fields


# --- E2E -------------------------------------------------------------------------------------------------------------


def test_a_value_may_hold_commas_and_the_order_is_kept():
    assert parse_mr("near[A, B and C] ,name[D]") == {"near": "A, B and C", "name": "D"}
    assert list(parse_mr("near[A], name[D]")) == ["near", "name"]


@pytest.mark.parametrize("mr", ["", "name[Blue Spice", "name[a] eatType[pub]", "name[ ]", "name[a], name[b]"])
def test_a_malformed_meaning_representation_is_refused(mr):
    with pytest.raises(DataError):
        parse_mr(mr)


def test_an_unknown_attribute_is_named_with_the_nearest_one():
    with pytest.raises(DataError, match="did you mean 'eatType'"):
        parse_mr("eattype[pub]")


def test_csv_groups_equal_meanings_in_order_and_cleans_references(tmp_path):
    path = write(
        tmp_path / "train.csv",
        'mr,ref\n"name[B]","  One, two.\nThree. "\n"name[A]",Four.\n' + '"name[B]","Say ""five""."\n' * 2,
    )
    first, second = read_task("e2e", path)
    assert first.source == "name : B"
    assert first.targets == ("One, two. Three.", 'Say "five".', 'Say "five".')
    assert first.fields == {"mr": "name[B]"}
    assert (second.source, second.targets) == ("name : A", ("Four.",))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_test_csv_without_references(tmp_path, encoding):
    path = write(tmp_path / "testset.csv", '"MR"\r\n"near[Café Rouge], name[A]"\r\n\r\nname[B]\r\n', encoding)
    assert [(example.source, example.targets) for example in read_task("e2e", path)] == [
        ("near : Café Rouge | name : A", ()),
        ("name : B", ()),
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "id,meaning_representation,human_reference\n1,name[B],One.\n2,name[B],Two.\n"),
        (
            "a.jsonl",
            '{"meaning_representation": "name[B]", "human_reference": "One."}\n'
            '{"gem_id": "2", "meaning_representation": "name[B]", "target": "Two.", "references": []}\n',
        ),
        ("b.jsonl", '{"meaning_representation": "name[B]", "target": "One.", "references": ["One.", "Two."]}\n'),
    ],
)
def test_files_may_have_the_columns_of_the_hubs_sets(tmp_path, name, text):
    (example,) = read_task("e2e", write(tmp_path / name, text))
    assert (example.source, example.targets, example.fields) == ("name : B", ("One.", "Two."), {"mr": "name[B]"})
    bare = write(tmp_path / "bare.csv", "meaning_representation\nname[B]\n")
    assert read_task("e2e", bare)[0].targets == ()


def test_the_task_takes_no_columns(tmp_path):
    path = write(tmp_path / "a.csv", "mr,ref\nname[B],x\n")
    with pytest.raises(ConfigError):
        read_task("e2e", path, source="{mr}")
    with pytest.raises(ConfigError, match="did you mean 'e2e'"):
        read_task("e2", path)


# --- the real ones ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "folder", "part", "count", "targets"),
    [
        # Of WebNLG five entries of the training set and one of the development set have no good text.
        ("webnlg", "webnlg2017", "train", 6940 - 5, 18102 - 77),
        ("webnlg", "webnlg2017", "dev", 872 - 1, 2268 - 10),
        ("webnlg", "webnlg2017", "test", 1862, 4928),
        ("dart", "dart", "dev", 2768, 6980),
        ("dart", "dart", "test", 5097, 12551),
        ("e2e", "e2e", "train", 4862, 42061),
        ("e2e", "e2e", "dev", 547, 4672),
        ("e2e", "e2e", "test", 630, 4693),
        ("scitldr", "scitldr", "train", 1992, 1992),
        ("scitldr", "scitldr", "dev", 619, None),
        ("scitldr", "scitldr", "test", 618, None),
    ],
)
def test_the_whole_sets(shared_data, task, folder, part, count, targets):
    examples = read_task(task, shared_data / folder, split=part)
    assert len(examples) == count
    assert targets in (None, sum(len(example.targets) for example in examples))
    for example in examples:
        assert example.targets
        assert "\n" not in example.source + "".join(example.targets)
        assert all(target == target.strip() != "" for target in example.targets)
        assert set(example.groups) == set(TASKS[task].groups) - ({"seen"} if part != "test" else set())
    if task == "dart":
        assert {len(example.fields.get("official_references", ())) for example in examples} == {3 * (part == "test")}
    if task == "e2e":
        assert len({example.source for example in examples}) == count
        assert all(one.groups == {"attributes": str(one.fields["mr"].count("["))} for one in examples)
    if (task, part) == ("webnlg", "test"):
        assert Counter(example.groups["seen"] for example in examples) == {"seen": 971, "unseen": 891}
        assert Counter(example.groups["category"] for example in examples)["Artist"] == 213
        assert {example.groups["triples"] for example in examples} == set("1234567")
    if task == "scitldr":
        path = shared_data / "scitldr" / f"{part}.jsonl.gz"
        assert read_task("summarization", path, target="references")[0] == examples[0]
