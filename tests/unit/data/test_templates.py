"""Rows whose columns are named: templates, merging, labels, summaries, and the error for a wrong row."""

import json

import pytest

from data_files import write
from prefixtune.data import TASKS, as_examples, read_task
from prefixtune.data.forms import render
from prefixtune.errors import ConfigError, DataError

ROWS = [{"name": "Aromi", "food": "Italian", "text": "Eat."}, {"name": "Mill", "food": "French", "text": "Go, eat."}]
WANTED = [("Aromi is Italian", ("Eat.",)), ("Mill is French", ("Go, eat.",))]


def test_a_file_and_a_list_give_the_same(tmp_path):
    path = write(tmp_path / "v1.2.tsv.gz", "\ufeffname\tfood\ttext\nAromi\tItalian\tEat.\nMill\tFrench\tGo, eat.\n")
    examples = read_task("records", path, source="{name} is {food}", target="text")
    assert [(example.source, example.targets) for example in examples] == WANTED
    assert [example.fields for example in examples] == ROWS
    assert as_examples(ROWS, "{name} is {food}", "text") == examples


def test_equal_sources_become_one_example_with_all_targets_in_order(tmp_path):
    path = write(
        tmp_path / "a.jsonl", '{"q": "b", "a": ["1", "2"], "n": 0}\n{"q": "a", "a": "3"}\n{"q": " b ", "a": ["1", 4]}\n'
    )
    first, second = read_task("records", path, source="q", target="a")
    assert (first.source, first.targets, first.fields["n"]) == ("b", ("1", "2", "1", "4"), 0)
    assert (second.source, second.targets) == ("a", ("3",))


def test_without_a_target_there_are_none(tmp_path):
    path = write(tmp_path / "a.csv", "q,target\nx,1\ny,2\n")
    assert [(one.source, one.targets) for one in read_task("records", path, source="q")] == [("x", ()), ("y", ())]


@pytest.mark.parametrize(
    ("template", "record", "text"),
    [
        ("{a}", {"a": "{b}", "b": "no"}, "{b}"),
        ("{{{a}}} }}{{", {"a": "x"}, "{x} }{"),
        ("{a.b} {a[0]} {a!r:>9}", {"a.b": "1", "a[0]": "2", "a!r:>9": "3"}, "1 2 3"),
        ("{customer rating}: {n}, {ok}", {"customer rating": "high", "n": 2.5, "ok": True}, "high: 2.5, true"),
        ("a b", {"a b": "  two\nlines "}, "two\nlines"),
        ("\\1 {a}", {"a": "\\g<0>"}, "\\1 \\g<0>"),
    ],
)
def test_only_whole_columns_are_replaced(template, record, text):
    assert render(template, record, "line 1") == text
    with pytest.raises(DataError):
        render("{a.__class__}", record, "line 1")


@pytest.mark.parametrize("template", ["{a", "a}", "{}", "{a} {", "", "  ", "{{a}}", "{a{b}}"])
def test_a_malformed_template_is_refused_before_the_file_is_read(template, tmp_path):
    for task in ("records", "classification", "summarization"):
        for source, target in ((template, None), ("a", template)):
            with pytest.raises(ConfigError):
                read_task(task, tmp_path / "missing.csv", source=source, target=target)


def test_a_target_alone_is_refused_and_nothing_at_all_is_recognized(tmp_path):
    path = write(tmp_path / "a.csv", "q,a\nx,y\n")
    with pytest.raises(ConfigError):
        read_task("records", path, target="a")
    with pytest.raises(DataError, match=r"a\.csv, line 2 has the columns q, a"):
        read_task("records", path)


# --- labels ----------------------------------------------------------------------------------------------------------


def test_labels_have_columns_of_their_names_or_templates_and_each_row_stays(tmp_path):
    path = write(tmp_path / "a.csv", "text,label\nFine.,good\nFine.,good\nFine.,bad\n")
    assert [one.targets for one in read_task("classification", path)] == [("good",), ("good",), ("bad",)]
    path = write(tmp_path / "b.csv", "premise,hypothesis,gold,side\nIt rains.,It is wet.,yes,a\n")
    for source, target, wanted in (
        ("{premise} => {hypothesis}", "gold", ("It rains. => It is wet.", ("yes",))),
        ("premise", "{side}/{gold}", ("It rains.", ("a/yes",))),
    ):
        (example,) = read_task("classification", path, source=source, target=target)
        assert (example.source, example.targets) == wanted


@pytest.mark.parametrize(
    ("value", "label"),
    [('"yes"', "yes"), ('" very good "', "very good"), ("3", "3"), ("true", "true"), ('["only"]', "only")],
)
def test_a_label_is_the_text_that_json_writes(tmp_path, value, label):
    path = write(tmp_path / "a.jsonl", f'{{"text": "x", "label": {value}}}')
    assert read_task("classification", path)[0].targets == (label,)


# --- summaries -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"article": "It rained. \\n A lot.", "highlights": " Rain. ", "id": "7"}'),
        ("a.csv", 'id,document,summary\n7,"It rained.\r\nA lot.",Rain.\n'),
    ],
)
def test_the_columns_of_well_known_summaries_need_no_names(tmp_path, name, text):
    (example,) = read_task("summarization", write(tmp_path / name, text))
    assert (example.source, example.targets) == ("It rained. A lot.", ("Rain.",))


def test_columns_of_summaries_may_be_named_and_equal_documents_stay_apart(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"title": "Weather", "body": "It rained.", "short": ["Rain.", "Wet\\nday."]}')
    (example,) = read_task("summarization", path, source="{title}: {body}", target="short")
    assert (example.source, example.targets) == ("Weather: It rained.", ("Rain.", "Wet day."))
    assert example.fields["title"] == "Weather"
    path = write(tmp_path / "a.csv", "document,summary\nx,a\nx,b\n")
    assert [example.targets for example in read_task("summarization", path)] == [("a",), ("b",)]


def test_scitldr_as_released_and_as_json_lines(tmp_path):
    released = {"source": ["We learn.", " It works.\n"], "target": ["Learning works.", "It learns."], "paper_id": "x"}
    lines = {"id": "x", "document": "We learn. It works.", "references": released["target"]}
    one = read_task("scitldr", write(tmp_path / "a.jsonl", json.dumps(released)))
    other = read_task("scitldr", write(tmp_path / "b.jsonl", json.dumps(lines)))
    assert one == other
    assert (one[0].source, one[0].targets) == ("We learn. It works.", ("Learning works.", "It learns."))
    assert (one[0].fields["paper_id"], other[0].fields["id"]) == ("x", "x")


# --- tags ------------------------------------------------------------------------------------------------------------

SENTENCES = [
    {"tokens": ["The", "Grey", "Wolf", "left"], "tags": ["O", "B-TRAIN", "I-TRAIN", "O"]},
    {"tokens": ["Westport", "!"], "tags": ["B-STATION", "O"]},
]


def test_tokens_and_tags_of_a_sentence(tmp_path):
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, [*SENTENCES, SENTENCES[0]])))
    examples = read_task("tagging", path)
    # Each sentence stays its own example.
    assert [(example.source, example.targets) for example in examples] == [
        ("The Grey Wolf left", ("O B-TRAIN I-TRAIN O",)),
        ("Westport !", ("B-STATION O",)),
        ("The Grey Wolf left", ("O B-TRAIN I-TRAIN O",)),
    ]
    assert dict(examples[1].fields) == {"tokens": ("Westport", "!"), "tags": ("B-STATION", "O")}
    assert TASKS["tagging"].kind == "tagging"


def test_other_columns_may_be_named_and_i_may_begin_a_span_as_in_older_files(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"words": ["Hello"], "ner": ["I-X"], "tokens": 3}')
    (example,) = read_task("tagging", path, source="words", target="ner")
    assert dict(example.fields) == {"tokens": ("Hello",), "tags": ("I-X",)}
