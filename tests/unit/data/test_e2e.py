"""E2E: the linearization, the release's CSV, JSON lines, and the error for a wrong file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from data_files import write
from prefixtune.data import TASKS, read_task
from prefixtune.data.benchmarks import linearize_e2e, parse_mr
from prefixtune.errors import ConfigError, DataError

DATA = Path(__file__).resolve().parents[4] / "shared" / "data" / "e2e"
SPICE = "name[Blue Spice], eatType[coffee shop], area[city centre]"


def test_linearization_is_the_authors():
    assert linearize_e2e(SPICE) == "name : Blue Spice | Type : coffee shop | area : city centre"
    every = (
        "name[The Vaults], eatType[pub], food[Fast food], priceRange[more than £30], customer rating[5 out of 5], "
        "area[riverside], familyFriendly[yes], near[Café Adriatic]"
    )
    assert linearize_e2e(every) == (
        "name : The Vaults | Type : pub | food : Fast food | price : more than £30 | customer rating : 5 out of 5 | "
        "area : riverside | family friendly : yes | near : Café Adriatic"
    )


def test_a_value_may_hold_commas_and_the_order_is_kept():
    assert parse_mr("near[A, B and C] ,name[D]") == {"near": "A, B and C", "name": "D"}
    assert list(parse_mr("near[A], name[D]")) == ["near", "name"]


@pytest.mark.parametrize(
    "mr", ["", "name[Blue Spice", "name[a] eatType[pub]", "name[ ]", "name[a], name[b]", "[a]", "name[a]; near[b]"]
)
def test_a_malformed_meaning_representation_is_refused(mr: str) -> None:
    with pytest.raises(DataError):
        parse_mr(mr)


def test_an_unknown_attribute_is_named_with_the_nearest_one() -> None:
    with pytest.raises(DataError, match="did you mean 'eatType'"):
        parse_mr("eattype[pub]")


def test_csv_groups_equal_meanings_in_order_and_cleans_references(tmp_path: Path) -> None:
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
def test_test_csv_without_references(tmp_path: Path, encoding: str):
    path = write(tmp_path / "testset.csv", '"MR"\r\n"near[Café Rouge], name[A]"\r\n\r\nname[B]\r\n', encoding)
    assert [(example.source, example.targets) for example in read_task("e2e", path)] == [
        ("near : Café Rouge | name : A", ()),
        ("name : B", ()),
    ]


def test_json_lines_and_gzip_give_the_same(tmp_path: Path):
    lines = [{"mr": "name[B]", "references": ["One.", "Two."]}, {"mr": "name[A]", "references": ["\u2028Three."]}]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    plain = write(tmp_path / "dev.jsonl", text)
    zipped = tmp_path / "dev.jsonl.gz"
    zipped.write_bytes(gzip.compress(text.encode()))
    assert read_task("e2e", plain) == read_task("e2e", zipped)
    assert [example.targets for example in read_task("e2e", plain)] == [("One.", "Two."), ("Three.",)]


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
def test_files_may_have_the_columns_of_the_hubs_sets(tmp_path: Path, name: str, text: str):
    (example,) = read_task("e2e", write(tmp_path / name, text))
    assert (example.source, example.targets, example.fields) == ("name : B", ("One.", "Two."), {"mr": "name[B]"})
    bare = write(tmp_path / "bare.csv", "meaning_representation\nname[B]\n")
    assert read_task("e2e", bare)[0].targets == ()


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "meaning,ref\nname[B],x\n", "line 2: 'mr'"),
        ("a.csv", 'mr,ref\nname[B],"two\nlines"\nBlue,y\n', "line 4: .*'Blue'"),
        ("a.csv", "mr,ref\nname[B], \n", "line 2: 'ref'"),
        ("a.jsonl", '{"mr": "name[B]", "references": ["x", null]}', "line 1: 'references'"),
        ("a.jsonl", '{"mr": "name[B]", "references": []}', "line 1: 'references'"),
        ("a.jsonl", '{"mr": "name[B]", "references": ["\\ud83d"]}', "line 1"),
        ("a.json", "[]", r"\.csv, \.jsonl"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(tmp_path: Path, name: str, text: str, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode())
    with pytest.raises(DataError, match=says) as caught:
        read_task("e2e", path)
    assert str(path) in str(caught.value)


def test_the_task_decodes_as_the_paper_says_and_takes_no_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "mr,ref\nname[B],x\n")
    assert TASKS["e2e"].decoding == {
        "num_beams": 5,
        "min_new_tokens": 5,
        "max_new_tokens": 100,
        "ban_newlines": True,
        "length_penalty": 1.0,
    }
    with pytest.raises(ConfigError):
        read_task("e2e", path, source="{mr}")
    with pytest.raises(ConfigError, match="did you mean 'e2e'"):
        read_task("e2", path)


@pytest.mark.skipif(not DATA.is_dir(), reason="the E2E data set is not on this machine")
@pytest.mark.parametrize(
    ("part", "meanings", "pairs"), [("train", 4862, 42061), ("dev", 547, 4672), ("test", 630, 4693)]
)
def test_the_whole_set(part: str, meanings: int, pairs: int):
    examples = read_task("e2e", DATA / f"{part}.jsonl.gz")
    assert len(examples) == meanings == len({example.source for example in examples})
    assert sum(len(example.targets) for example in examples) == pairs
    for example in examples:
        assert all(target == target.strip() and "\n" not in target for target in example.targets)
