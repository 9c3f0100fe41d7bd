"""What is wrong in a file is named by the file, its place and the column, in one line, whatever the task."""

import json

import pytest

from prefixtune.data import read_task
from prefixtune.errors import DataError

ENTRY = '<entry category="Airport" eid="Id1"><modifiedtripleset>{}</modifiedtripleset><lex>x</lex></entry>'
RELEASE = {"tripleset": [["a", "b", "c"]], "subtree_was_extended": False}
TEXT = {"source": "e2e", "text": "x"}
TRIPLE = '{"triples": [["a", "b", "c"]]'
COLUMNS = {"source": "q", "target": "a"}


def xml(entry):
    return f"<benchmark>\n<entries>\n{entry}</entries></benchmark>\n"


@pytest.mark.parametrize(
    ("task", "name", "text", "says"),
    [
        ("webnlg", "a.xml", xml(ENTRY.format("<mtriple>a | b | c</mtriple>"))[:-20], "line 3"),
        ("webnlg", "a.xml", xml(ENTRY.format("<mtriple>a | b</mtriple>")), "entry 1: 'input'"),
        ("webnlg", "a.jsonl", '{"triple": []}', "line 1: there is no column 'triples'"),
        ("webnlg", "a.jsonl", TRIPLE + ', "references": ["x"], "seen": "no"}', "'seen'"),
        ("dart", "a.json", json.dumps([{**RELEASE, "annotations": [TEXT]}, {**RELEASE, "annotations": []}]),
         "item 2: 'annotations'"),
        ("dart", "a.json", json.dumps([{**RELEASE, "tripleset": [["a", "b", None]], "annotations": [TEXT]}]),
         "'tripleset'"),
        ("dart", "a.jsonl", TRIPLE + ', "references": ["x"], "sources": "y"}', "'sources'"),
        ("e2e", "a.csv", "meaning,ref\nname[B],x\n", "line 2: 'mr'"),
        ("e2e", "a.csv", 'mr,ref\nname[B],"two\nlines"\nBlue,y\n', "line 4: .*'Blue'"),
        ("e2e", "a.jsonl", '{"mr": "name[B]", "references": ["x", null]}', "line 1: 'references'"),
        ("e2e", "a.jsonl", '{"mr": "name[B]", "references": ["\\ud83d"]}', "line 1"),
        ("e2e", "a.json", "[]", r"\.csv, \.jsonl"),
        ("tagging", "a.jsonl", '{"tokens": ["a"], "tags": ["O"]}\n{"tokens": ["a"], "tags": []}', "line 2: 'tags'"),
        ("tagging", "a.jsonl", '{"tokens": ["10\\u00a0000"], "tags": ["O"]}', "line 1: 'tokens'"),
        ("tagging", "a.jsonl", '{"tokens": ["a"], "tags": ["NN"]}', "line 1: 'tags' is 'NN'"),
        ("records", "a.csv", "question,a\nx,y\n", "line 2: there is no column 'q'"),
        ("records", "a.csv", "q,a\nx,y\n ,y\n", "line 3: 'q'"),
        ("records", "a.jsonl", '{"q": "x", "a": "y"}\n\n{"q": "x"}\n', "line 3: there is no column 'a'"),
        ("records", "a.jsonl", '{"q": null, "a": "y"}', "line 1: 'q'"),
        ("records", "a.jsonl", '{"q": ["x"], "a": "y"}', "'q'"),
        *(("records", "a.jsonl", f'{{"q": "x", "a": {value}}}', "'a'") for value in ('["y", ""]', '[["y"]]', "[]")),
        *(
            ("classification", "a.jsonl", f'{{"text": "x", "label": "y"}}\n{{"text": "x", "label": {label}}}',
             "line 2: 'label'")
            for label in ('["a", "b"]', "[]", "2.5", "[2.5]", '" "', "null")
        ),
        ("summarization", "a.csv", "text,summary\nx,y\n", "line 2 has the columns text, summary"),
        ("summarization", "a.csv", "document,summary\nx,y\n , y\n", "line 3: 'document'"),
        ("scitldr", "a.jsonl", '{"text": "x", "target": ["y"]}', "no column 'document' or 'source'"),
        ("scitldr", "a.jsonl", '{"source": ["x"], "summary": ["y"]}', "no column 'references' or 'target'"),
        ("scitldr", "a.jsonl", '{"source": ["x", 3], "target": ["y"]}', "'source' is 3"),
        ("scitldr", "a.jsonl", '{"source": ["x"], "target": []}', "'target'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_place(tmp_path, task, name, text, says):
    path = tmp_path / name
    path.write_bytes(text.encode())
    with pytest.raises(DataError, match=says) as caught:
        read_task(task, path, **(COLUMNS if task == "records" else {}))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
