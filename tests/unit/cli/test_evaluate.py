"""`prefixtune evaluate`: how data is read with a trained prefix; outputs of any system, scored without a model."""

import io
import json
import sys

import pytest
import torch

from command_line import call, run
from prefixtune.errors import ConfigError, DataError
from prefixtune.prefix.prefix import Prefix, save_prefix
from prefixtune.report import compose, read_results, to_html

ITEMS = [
    {"mr": "name[Aromi]", "references": ["Aromi is a pub.", "There is a pub called Aromi."]},
    {"mr": "name[Blue Spice]", "references": ["Blue Spice is near the river."]},
    {"mr": "name[The Mill], near[Aromi]", "references": ["The Mill is near Aromi, a good pub."]},
]
SOURCES = ["name : Aromi", "name : Blue Spice", "name : The Mill | near :  Aromi"]
OUTPUTS = ["Aromi is a pub.", "Blue Spice is by the river.", "The Mill is near Aromi."]


def save(path, **header):
    pair = torch.zeros(2, 4, 8), torch.ones(2, 4, 8)
    facts = {"backbone": {"name": "model", "kind": "decoder", "fingerprint": "a:b"}, "task": "records", **header}
    return str(save_prefix(path, Prefix({"decoder": (pair,)}, facts)))


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_form_is_read_with_a_prefix_that_was_trained_by_templates(tmp_path):
    prefix = save(tmp_path / "p.safetensors", text_format={"source": "{name} is {food}", "target_template": "text"})
    data = write(tmp_path / "qa.jsonl", as_lines([{"question": "Who?", "answer": "Ann."}]))
    words = ("evaluate", "--prefix", prefix, "--data", data, "--print-config")
    with pytest.raises(DataError, match="'name'"):
        call(*words)
    out, err = run(*words, "--form", "question")
    assert "max_new_tokens" in out
    assert "questions and answers" in err


def test_options_that_do_not_go_with_texts_alone_or_with_a_model(tmp_path):
    data = write(tmp_path / "texts.jsonl", '{"text": "one two"}\n')
    for option in (("--metrics", "bleu"), ("--instruction", "Go on."), ("--against", "x.txt")):
        with pytest.raises(ConfigError, match=option[0]):
            call("evaluate", "--data", data, *option)


# --- outputs of any system -------------------------------------------------------------------------------------------


@pytest.fixture
def references(tmp_path):
    return write(tmp_path / "test.jsonl", as_lines(ITEMS))


@pytest.fixture
def outputs(tmp_path):
    return write(tmp_path / "outputs.txt", "".join(f"{line}\n" for line in OUTPUTS))


def scored(capsys, *arguments):
    assert call("evaluate", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_scores_agree_with_the_library(references, outputs, capsys):
    from prefixtune.evaluation.metrics import measure

    options = ("--task", "e2e", "--data", references, "--outputs", outputs)
    result = scored(capsys, *options, "--metrics", "nist,bleu,ter")
    wanted = measure(OUTPUTS, [item["references"] for item in ITEMS], protocol="e2e", metrics=["nist", "bleu", "ter"])
    assert result["scores"] == {name: one.to_score().model_dump() for name, one in wanted.items()}
    assert list(result["scores"]) == ["nist", "bleu", "ter"]
    assert (result["num_examples"], result["task"], result["left_out"]) == (3, "e2e", {})
    other = scored(capsys, *options, "--metrics", "bleu", "--protocol", "plain")
    assert other["scores"]["bleu"]["implementation"].endswith("protocol plain")


def test_outputs_are_lines_or_json_lines_in_any_order(references, outputs, tmp_path, capsys, monkeypatch):
    options = ("--task", "e2e", "--data", references, "--metrics", "bleu", "--outputs")
    wanted = scored(capsys, *options, outputs)
    pairs = enumerate(zip(SOURCES, OUTPUTS, strict=True))
    rows = [{"number": number, "source": source, "output": text} for number, (source, text) in pairs]
    right = write(tmp_path / "outputs.jsonl", as_lines([rows[2], rows[0], rows[1]]))
    assert scored(capsys, *options, right) == wanted
    monkeypatch.setattr(sys, "stdin", io.StringIO(as_lines([{"output": text} for text in OUTPUTS])))
    assert scored(capsys, "--task", "e2e", "--data", references, "--metrics", "bleu", "--outputs=-") == wanted
    # Outputs of another set name other sources.
    other = write(tmp_path / "other.jsonl", as_lines([rows[0], {**rows[1], "source": SOURCES[2]}, rows[2]]))
    twice = write(tmp_path / "another.jsonl", as_lines({"number": number, "output": "a"} for number in (1, 1, 0)))
    gap = write(tmp_path / "a.other.jsonl", as_lines({"number": number, "output": "a"} for number in (0, 3, 1)))
    for arguments in ((other,), (twice,), (gap,), (right, "--against", other)):
        with pytest.raises(DataError, match=r"other\.jsonl, line 2"):
            call("evaluate", *options, *arguments)


def test_a_second_system_intervals_and_the_report(references, outputs, tmp_path, capsys):
    other = write(tmp_path / "other.txt", "Something.\nQuite.\nDifferent.\n")
    options = ["--task", "e2e", "--data", references, "--outputs", outputs, "--metrics", "ter"]
    options += ["--intervals", "--against", other, "--output", str(tmp_path / "scored")]
    result = scored(capsys, *options)
    low, high = result["scores"]["ter"]["interval"]
    assert low <= result["scores"]["ter"]["score"] <= high
    against = result["against"]
    assert against["outputs"] == other
    found = against["comparison"]["ter"]
    assert found["difference"] == result["scores"]["ter"]["score"] - against["scores"]["ter"]["score"] < 0
    assert (0 < found["p_value"] <= 1, found["samples"]) == (True, 1000)
    assert call("evaluate", *options) == 0
    assert "approximate randomization" in capsys.readouterr().out
    stored = read_results(tmp_path / "scored")
    assert stored.evaluation.summary()["against"] == against
    assert [row.output for row in stored.outputs] == OUTPUTS
    assert f"p = {found['p_value']:.4f}" in to_html(compose([stored]))


def test_the_first_examples_or_all(references, outputs, tmp_path, capsys):
    options = ("--task", "e2e", "--data", references, "--metrics", "ter", "--outputs")
    first = write(tmp_path / "first.txt", "".join(f"{line}\n" for line in OUTPUTS[:2]))
    for wrong in ((first,), (first, "--limit", "1")):
        with pytest.raises(DataError, match=r"2 outputs.* 3 examples"):
            call("evaluate", *options, *wrong)
    found = scored(capsys, *options, first, "--limit", "2")
    assert found["num_examples"] == 2
    assert found == scored(capsys, *options, outputs, "--limit", "2"), "outputs may also be of all examples"


def test_without_java_default_metrics_are_left_out_and_asked_ones_refused(references, outputs, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    options = ["--task", "e2e", "--data", references, "--outputs", outputs]
    result = scored(capsys, *options)
    assert list(result["scores"]) == ["bleu", "nist"]
    assert list(result["left_out"]) == ["meteor", "rouge_l", "cider"]
    with pytest.raises(ConfigError):
        call("evaluate", *options, "--metrics", "bleu,meteor")


def test_labels_and_tags(tmp_path, capsys):
    labels = write(tmp_path / "test.csv", "text,label\nsplendid,good\ndull,bad\nfine,good\n")
    options = ["--data", labels, "--outputs", write(tmp_path / "labels.txt", "good\ngood\ngood\n")]
    found = {name: one["score"] for name, one in scored(capsys, *options)["scores"].items()}
    assert found == {"accuracy": pytest.approx(200 / 3), "macro_f1": pytest.approx(40)}
    assert list(scored(capsys, *options, "--metrics", "accuracy")["scores"]) == ["accuracy"]
    for wrong in (("--metrics", "bleu"), ("--against", labels), ("--intervals",)):
        with pytest.raises(ConfigError):
            call("evaluate", *options, *wrong)
    tags = write(tmp_path / "tags.jsonl", as_lines([{"tokens": ["to", "Rome", "now"], "tags": ["O", "B-PLACE", "O"]}]))
    options = ["--task", "tagging", "--data", tags, "--outputs"]
    found = scored(capsys, *options, write(tmp_path / "tags.txt", "O B-PLACE B-TIME\n"))["scores"]
    assert [found[name]["score"] for name in ("span_f1", "accuracy")] == [pytest.approx(200 / 3)] * 2
    with pytest.raises(DataError):
        call("evaluate", *options, write(tmp_path / "short.txt", "O\n"))
