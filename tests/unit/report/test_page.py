"""Reports of made-up folders: what a reader finds in the page and in its Markdown, and what broken folders say."""

from __future__ import annotations

import csv
import html
import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from contrast import contrast
from made_up_runs import (
    cell,
    evaluation,
    examples,
    length_study,
    low_data_study,
    measure,
    methods_study,
    study_json,
    training,
    write,
    write_lines,
)
from prefixtune.errors import DataError
from prefixtune.pages import figures
from prefixtune.report import compose, read_results, results, save_figures, to_html, to_markdown

NASTY = (
    "</script><script>alert(1)</script>",
    '<img src="http://example.org/x.png" onerror=alert(1)>',
    "a | b \\| `code` *bold* [link](http://example.org) $x$",
    "# no heading\n\n- no item\r\n1. no number",
    "\u202eright to left\u2028line separator\x00\x07\x85",
    "&lt;already&gt; &amp; café 漢字 🍣",
)
VOID = {"meta", "link", "input", "br", "hr", "img"}


def pages(*folders: Path, title: str = "") -> tuple[str, str]:
    document = compose([read_results(folder) for folder in folders], title)
    return to_html(document), to_markdown(document)


class Page(HTMLParser):
    """A page taken apart; complains about tags that do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def text(self) -> str:
        return "".join(data for name, data in self.texts if name not in ("script", "style"))

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]


def markdown_tables(text: str) -> list[list[list[str]]]:
    """Every table's rows; each must have as many cells as its head."""
    tables: list[list[list[str]]] = []
    rows: list[list[str]] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            assert line.endswith("|")
            rows.append([part.strip() for part in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif rows:
            assert all(re.fullmatch(r"-{3}:?", part) for part in rows[1]), rows[1]
            assert {len(row) for row in rows} == {len(rows[0])}
            tables.append([rows[0], *rows[2:]])
            rows = []
    return tables


def column(text: str, head: str, table: int = 0) -> dict[str, str]:
    """A column of a Markdown table, by the first cell of each row."""
    names, *rows = markdown_tables(text)[table]
    return {row[0]: row[names.index(head)] for row in rows}


# --- what is in it ---------------------------------------------------------------------------------------------------


def test_a_study_shows_scores_costs_and_the_best(tmp_path: Path) -> None:
    page, text = pages(methods_study(tmp_path / "methods"))
    # The best, but not by more than chance: the interval of the prefix reaches to 64.30.
    assert column(text, "BLEU")["fine-tuning"] == "**63.90** \\[62.00, 65.80\\]"
    assert column(text, "BLEU")["prefix"] == "62.40 \\[60.50, 64.30\\]"
    # Of TER the lowest is best: 0.95 - 63.9 / 120.
    assert column(text, "TER (lower is better)")["fine-tuning"].startswith("**0.4175** \\[")
    assert column(text, "parameters (trained)")["prefix"] == "1,234,432 (92,160 stored)"
    assert column(text, "file (size)")["prefix"] == "372 kB"
    assert column(text, "training (time)")["prefix"] == "15 min 05 s (160 steps)"
    assert column(text, "file (size)")["zero-shot"] == "n/a"
    shown = Page(page).text()
    for part in (
        "63.90 (best)",
        "62.40",
        "1,234,432",
        "372 kB",
        "Each method ran with one seed, not five.",
        "2026-11-25",
    ):
        assert part in shown
    assert "prefixtune study methods --output studies/methods" in shown
    assert "unfinished" not in shown


def test_differences_of_points_from_their_counterparts(tmp_path: Path) -> None:
    study = low_data_study(tmp_path / "study")
    point = {
        "point": "fine-tuning-50",
        "reference": "prefix-50",
        "part": "",
        "differences": [1.5, -0.25],
        "p_values": [0.0312, None],
        "mean": 0.625,
        "standard_error": 0.875,
    }
    names = {f"{method}-50-{subset}-0": method for method in ("prefix", "fine-tuning") for subset in range(3)}
    for old, method in names.items():
        path = study / "cells" / old / "cell.json"
        facts = json.loads(path.read_text())
        write(path, {**facts, "id": f"{method}-50-subset{facts['factors']['subset']}-seed0"})
    write(study / "comparisons.json", {"metric": "bleu", "test": "a test of pairs", "points": [point]})
    _, text = pages(study)
    table = next(table for table in markdown_tables(text) if table[0][0] == "of")
    assert table == [
        ["of", "less that of", "mean (± standard error)", "each run", "p (each run)"],
        [
            "fine-tuning, number of targets 50",
            "prefix, number of targets 50",
            "+0.62 (± 0.88)",
            "+1.50; -0.25",
            "0.031; n/a",
        ],
    ]
    assert "p of each run: a test of pairs, over the test items" in text
    parts = [{**point, "part": part, "p_values": [None, None]} for part in ("", "seen")]
    write(study / "comparisons.json", {"metric": "bleu", "test": "a test of pairs", "points": parts})
    _, text = pages(study)
    table = next(table for table in markdown_tables(text) if table[0][0] == "of")
    assert table[0] == ["of", "less that of", "test items", "mean (± standard error)", "each run"]
    assert [row[2] for row in table[1:]] == ["all", "seen"]
    assert "a test of pairs" not in text


def test_tuning_shows_what_was_tried_and_what_was_chosen(tmp_path: Path) -> None:
    _, text = pages(methods_study(tmp_path / "methods"))
    rows = next(table for table in markdown_tables(text) if table[0][-1] == "choice")[1:]
    chosen = [(method, setting, tried) for method, setting, tried, _, choice in rows if choice == "chosen"]
    assert chosen == [("prefix", "learning rate", "0.001"), ("fine-tuning", "learning rate", "0.0001")]
    assert len(rows) == 6
    assert "at the edge of what was tried, so that a better one may lie beyond: fine-tuning" in text


def test_repetitions_become_a_mean_with_a_spread(tmp_path: Path) -> None:
    study_json(tmp_path, factors=["method"])
    for seed, score in enumerate((50.0, 52.0, 57.0)):
        cell(tmp_path, {"method": "prefix", "seed": seed}, score)
    _, text = pages(tmp_path)
    # The squares of -3, -1 and 4 sum to 26; halved, their root is 3.6056.
    assert column(text, "BLEU")["prefix"] == "53.00 ± 3.61 (50.00 to 57.00)"
    assert column(text, "runs (done of planned)")["prefix"] == "3 of 3"


def test_an_unfinished_study_says_so_first(tmp_path: Path) -> None:
    study = low_data_study(tmp_path / "study")
    page, text = pages(study)
    shown = Page(page).text()
    warning = "This study is unfinished: 22 of 25 cells are done, 1 failed, 2 wait."
    assert shown.index(warning) < shown.index("BLEU at number of targets")
    assert warning in text.split("##")[1]
    assert "TrainingError: the loss is not finite." in shown
    assert "fine-tuning-500-0-0, fine-tuning-500-2-0" in shown
    # Methods are compared where both have come to, and not at the place that only one has reached.
    assert "BLEU at number of targets 200" in shown
    rows = {(row[0], row[1]): row[3] for row in markdown_tables(text)[1][1:]}
    assert rows["prefix", "200"].startswith("**")
    assert "**" not in rows["prefix", "500"]
    assert "★" not in rows["prefix", "200"]
    assert rows["fine-tuning", "500"] == "n/a"
    assert ("zero-shot", "–") in rows


def test_a_cell_that_is_being_made_waits(tmp_path: Path) -> None:
    study = methods_study(tmp_path)
    (study / "cells" / "infix").mkdir()
    log = training(study / "cells" / "p-tuning") / "events.jsonl"
    log.write_text(log.read_text()[:-5])  # killed in the middle of a line
    shown = Page(pages(study)[0]).text()
    assert "5 of 7 cells are done, 2 wait" in shown
    assert "infix, p-tuning" in shown


def test_figures_that_are_missing_or_no_numbers_are_said(tmp_path: Path) -> None:
    study = methods_study(tmp_path)
    broken = study / "cells" / "prefix" / "evaluation.json"
    values = json.loads(broken.read_text())
    values["scores"]["bleu"] |= {"score": math.nan, "interval": [math.nan, math.nan]}
    values["scores"]["ter"]["score"] = None
    values["groups"]["seen"]["seen"]["scores"] = {}
    write(broken, values)
    (study / "cells" / "lora" / "evaluation.json").unlink()
    events = [{"event": "step", "step": n, "loss": math.nan, "loss_per_token": math.nan} for n in (1, 2)]
    write_lines(study / "cells" / "adapter" / "events.jsonl", events)
    page, text = pages(study)
    assert "Done, but without a finite BLEU: lora, prefix." in Page(page).text()
    assert column(text, "BLEU")["prefix"] == "n/a"
    assert column(text, "METEOR")["prefix"].startswith("0.4400")
    assert "nan" not in page.lower()
    assert "nan" not in text.lower()


def test_a_length_study_is_drawn_over_the_length(tmp_path: Path) -> None:
    page, text = pages(length_study(tmp_path))
    taken = Page(page)
    titles = [data for name, data in taken.texts if name == "title"]
    assert {"BLEU over prefix length", "METEOR over prefix length", "TER over prefix length"} <= set(titles)
    whole = next(table for table in markdown_tables(text) if table[0] == ["prefix length", "prefix"])
    assert [row[0] for row in whole[1:]] == ["1", "5", "10", "20", "40"]
    assert whole[4][1].startswith("62.90")


def test_evaluations_of_the_same_data_are_shown_side_by_side(tmp_path: Path) -> None:
    one = evaluation(training(tmp_path / "one"), 60.0, title="prefix")
    two = evaluation(tmp_path / "two", 6.1, title="bare model", data="elsewhere/test.jsonl.gz")
    page, text = pages(one, two)
    assert column(text, "BLEU") == {"prefix": "**60.00** ★ \\[58.10, 61.90\\]", "bare model": "6.10 \\[4.20, 8.00\\]"}
    assert "-53.90 BLEU from prefix to bare model" in text
    assert column(text, "parameters (trained)")["prefix"] == "1,234,432 (92,160 stored)"
    first = next(table for table in markdown_tables(text) if table[0] == ["", "text"])
    assert [row[0] for row in first[1:]] == ["source", "reference", "reference", "prefix", "bare model"]
    assert "= a reference" in Page(page).text()


def test_evaluations_of_other_data_are_not_compared(tmp_path: Path) -> None:
    one, two = evaluation(tmp_path / "one", count=60), evaluation(tmp_path / "two", 50.0, count=30, data="other.jsonl")
    _, text = pages(one, two, title="Both")
    assert text.startswith("# Both\n")
    assert "★" not in text
    assert text.count("### Scores") == 2


def test_a_star_needs_a_difference_beyond_chance(tmp_path: Path) -> None:
    first, near, far = (
        evaluation(tmp_path / title, title=title, scores={"bleu": measure(score, 1.9)}, groups={})
        for title, score in (("first", 60.0), ("near", 57.4), ("far", 57.2))
    )
    # The interval of a difference reaches sqrt(1.9^2 + 1.9^2) = 2.69 to either side.
    _, text = pages(first, near)
    assert column(text, "BLEU")["first"] == "**60.00** \\[58.10, 61.90\\]"
    assert text.count("★") == 1  # in the note
    page, text = pages(first, far)
    assert column(text, "BLEU")["first"] == "**60.00** ★ \\[58.10, 61.90\\]"
    assert "60.00★ (best, significant)" in Page(page).text()
    # Without intervals nothing is known about chance.
    bare = [evaluation(tmp_path / str(score), score, title=str(score), width=0.0) for score in (60.0, 6.0)]
    assert column(pages(*bare)[1], "BLEU")["60.0"] == "**60.00**"


def test_repetitions_are_compared_by_the_interval_of_their_mean(tmp_path: Path) -> None:
    study_json(tmp_path, factors=["method"])
    for seed in range(3):
        cell(tmp_path, {"method": "prefix", "seed": seed}, 60.0 + seed)
        cell(tmp_path, {"method": "adapter", "seed": seed}, 51.0 + 3 * seed)
        cell(tmp_path, {"method": "lora", "seed": seed}, 40.0 + seed)
    scores = column(pages(tmp_path)[1], "BLEU")
    # The means have intervals of ± 4.303 / sqrt(3) = 2.48 and 7.45; the difference of 7 has one of ± 7.86.
    assert scores["prefix"] == "**61.00 ± 1.00** (60.00 to 62.00)"
    for seed in range(3):
        cell(tmp_path, {"method": "adapter", "seed": seed}, 50.0 + seed)
    assert column(pages(tmp_path)[1], "BLEU")["prefix"] == "**61.00 ± 1.00** ★ (60.00 to 62.00)"


def test_a_difference_is_starred_where_every_run_shows_it(tmp_path: Path) -> None:
    point = {"point": "a", "reference": "b", "differences": [1.5, 2.5], "p_values": [0.01, 0.04], "mean": 2.0}
    points = [point, {**point, "p_values": [0.01, 0.06]}, {**point, "differences": [-1.5, 2.5], "mean": 0.5}]
    study = methods_study(tmp_path)
    write(study / "comparisons.json", {"metric": "bleu", "test": "a test of pairs", "points": points})
    table = next(table for table in markdown_tables(pages(study)[1]) if table[0][0] == "of")
    assert [row[2] for row in table[1:]] == ["+2.00 ★", "+2.00", "+0.50"]


def test_several_runs_are_in_one_curve(tmp_path: Path) -> None:
    page, text = pages(*(training(tmp_path / name, seed=seed, final=1 + seed) for seed, name in enumerate("abc")))
    drawn = [data for name, data in Page(page).texts if name == "title"][1:]
    assert drawn == ["Training loss, smoothed", "Development loss"]
    table = next(table for table in markdown_tables(text) if table[0] == ["run", "step", "loss"])
    assert {row[0] for row in table[1:]} == {"a", "b", "c"}


def test_systems_with_the_same_title_get_different_names(tmp_path: Path) -> None:
    _, text = pages(evaluation(tmp_path / "one"), evaluation(tmp_path / "two", 50.0))
    assert list(column(text, "BLEU")) == ["prefix (one)", "prefix (two)"]


def test_scores_by_different_implementations_are_flagged(tmp_path: Path) -> None:
    one = evaluation(tmp_path / "one", scores={"bleu": measure(50.0, name="mine 1")})
    two = evaluation(tmp_path / "two", scores={"bleu": measure(51.0, name="mine 2")})
    assert "BLEU: mine 1; or mine 2. These are different implementations" in pages(one, two)[1]


def test_parts_of_the_data_are_sorted_and_counted(tmp_path: Path) -> None:
    groups = {"triples": {str(n): {"num_examples": 10 * n, "scores": {"bleu": measure(60.0 - n)}} for n in (10, 2, 1)}}
    _, text = pages(evaluation(tmp_path, groups=groups))
    table = next(table for table in markdown_tables(text) if table[0][:2] == ["triples", "examples"])
    assert table[1:] == [["1", "10", "59.00"], ["2", "20", "58.00"], ["10", "100", "50.00"]]


def test_all_targets_are_as_many_as_the_log_says(tmp_path: Path) -> None:
    study_json(tmp_path, axis="num_targets", factors=["method", "num_targets"])
    cell(tmp_path, {"method": "zero-shot", "num_targets": 0}, 6.1, parameters=0, stored=0)
    cell(tmp_path, {"method": "prefix", "num_targets": 100}, 50.0)
    whole = cell(tmp_path, {"method": "prefix", "num_targets": 0}, 60.0)
    log = whole / "events.jsonl"
    log.write_text(log.read_text().replace('"total_steps"', '"num_targets": 42061, "total_steps"'))
    table = next(t for t in markdown_tables(pages(tmp_path)[1]) if t[0] == ["number of targets", "prefix", "zero-shot"])
    assert [row[0] for row in table[1:]] == ["–", "100", "42,061"]
    assert table[3][1].startswith("60.00")


def test_a_metric_that_was_left_out_is_said(tmp_path: Path) -> None:
    _, text = pages(evaluation(tmp_path, left_out={"nist": "it needs Java."}))
    assert "- NIST was left out: it needs Java." in text


def test_a_training_run_shows_its_losses(tmp_path: Path) -> None:
    page, text = pages(training(tmp_path / "run", end=False))
    assert "the log has no end" in Page(page).text()
    losses = next(table for table in markdown_tables(text) if table[0] == ["step", "training, smoothed", "development"])
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    development = {f"{e['step']}": f"{e['loss']:.3f}" for e in events if e["event"] == "evaluation"}
    assert {row[0]: row[2] for row in losses[1:] if row[2]} == development
    # The step's own loss is a sum over the target; shown is that of a token, as for the development data.
    assert all(float(row[1]) < 4 for row in losses[1:] if row[1])
    assert "| learning\\_rate | 0.001 |" in text


def test_settings_that_differ_are_shown_apart_from_equal_ones(tmp_path: Path) -> None:
    study_json(tmp_path, factors=["method"])
    for seed in range(2):
        cell(tmp_path, {"method": "prefix", "seed": seed}, 50.0)
    cell(tmp_path, {"method": "zero-shot"}, 6.1, parameters=0, stored=0)
    _, text = pages(tmp_path)
    tables = markdown_tables(text)
    differing = {row[0]: row[1:] for row in next(t for t in tables if t[0] == ["setting", "prefix", "zero-shot"])[1:]}
    assert differing["seed"] == ["0 (1), 7 (1)", "n/a"]
    equal = dict(next(t for t in tables if t[0] == ["setting", "value"])[1:])
    # The bare model has no learning rate, which makes that of the others no less equal.
    assert equal["learning\\_rate"] == "0.001"
    assert equal["evaluation: decoding.num\\_beams"] == "5"
    assert equal["version: torch"] == "2.13.0"


def test_outputs_are_sampled_evenly_and_all_are_in_the_page(tmp_path: Path) -> None:
    page, text = pages(evaluation(tmp_path, count=100))
    taken = Page(page)
    assert [f"Example {n}" in taken.text() for n in (1, 50, 100)] == [True] * 3
    assert "The other 80 examples" in taken.text()
    assert len(re.findall(r"\*\*Example \d+", text)) == 20
    assert "The other 80 examples are in the HTML file." in text


def test_a_page_holds_a_bounded_number_of_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = evaluation(tmp_path, count=100)
    monkeypatch.setattr("prefixtune.report.sections.details.MOST_OTHERS", 30)
    page, text = pages(folder)
    for shown in (Page(page).text(), text):
        assert "The other 30 examples" in shown
        assert "50 more examples are left out of this page; outputs.jsonl of each run has them." in shown
    assert len(re.findall(r"Example \d+", Page(page).text())) == 50
    monkeypatch.setattr("prefixtune.report.sections.details.MOST_CHARACTERS", 1000)
    # An example has about 200 characters.
    shown = Page(pages(folder)[0]).text()
    count = len(re.findall(r"Example \d+", shown))
    assert 22 <= count <= 28
    assert f"{100 - count} more examples are left out" in shown


def test_an_output_for_another_source_is_left_out(tmp_path: Path) -> None:
    study = methods_study(tmp_path)
    rows = examples(60, 0.5)
    rows[0]["source"] = "name : Elsewhere"
    write_lines(study / "cells" / "lora" / "outputs.jsonl", rows)
    _, text = pages(study)
    first = next(table for table in markdown_tables(text) if table[0] == ["", "text"])
    assert {row[0]: row[1] for row in first[1:]}["lora"] == "(no output)"


@pytest.mark.parametrize("values", [(0.0, 5e-324), (-1e99, 1e99), (1e308, 1.0), (1e-300, 1e15), (-0.0, -0.0)])
def test_extreme_numbers_are_drawn(values: tuple[float, float], tmp_path: Path) -> None:
    study_json(tmp_path, axis="num_targets", factors=["method", "num_targets"])
    for targets, value in zip((1, 10**9), values, strict=True):
        scores = {"bleu": measure(value, abs(value) / 2)}
        folder = cell(tmp_path, {"method": "prefix", "num_targets": targets}, 1.0)
        groups = {"kind": {"a": {"num_examples": 1, "scores": scores}}}
        write(folder / "evaluation.json", {"scores": scores, "groups": groups})
        write_lines(folder / "events.jsonl", [{"event": "step", "step": n, "loss": v} for n, v in enumerate(values)])
    titles = {text for name, text in Page(pages(tmp_path)[0]).texts if name == "title"}
    assert {"BLEU by kind", "BLEU over number of targets", "Training loss, smoothed"} <= titles


# --- how it is written -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Pages whose every text is an attack or a stumbling block."""
    folder = tmp_path_factory.mktemp("nasty")
    rows: list[dict[str, Any]] = [
        {"number": n, "source": text, "references": [text, ""], "output": text, "groups": {"category": text}}
        for n, text in enumerate((*NASTY, "", "half a pair: \ud83c"), start=1)
    ]
    attack = NASTY[0]
    evaluation(
        folder / "one",
        **dict.fromkeys(("title", "method", "backbone", "data", "task"), attack),
        scores={attack: measure(1.0, name=attack)},
        groups={attack: {attack: {"num_examples": 1, "scores": {attack: measure(1.0)}}}},
        settings={attack: {attack: attack}},
    )
    write_lines(folder / "one" / "outputs.jsonl", rows)
    study = folder / "study"
    study_json(study, title=NASTY[1], cut=list(NASTY), command=attack, tuning={attack: {attack: {attack: 1.0}}})
    cell(study, {"method": NASTY[2]}, 50.0)
    write(study / "cells" / "x" / "cell.json", {"id": attack, "status": "failed", "error": attack})
    return pages(folder / "one", study, title=attack)


def test_texts_stay_texts_in_the_page(nasty: tuple[str, str]) -> None:
    page, _ = nasty
    taken = Page(page)
    assert len(taken.all("script")) == 1
    assert taken.all("img") == []
    assert not any(key.startswith("on") or key == "style" for _, attributes in taken.elements for key in attributes)
    assert page.count("<script") == page.count("</script>") == 1
    assert all(text in taken.text() for text in (*NASTY[:3], NASTY[5]))
    assert not re.search("[\x00-\x08\x7f-\x9f\ud800-\udfff]", page)
    page.encode()


def test_texts_stay_texts_in_markdown(nasty: tuple[str, str]) -> None:
    _, text = nasty
    text.encode()
    assert markdown_tables(text)
    own = text.replace("> **Note:**", "").removesuffix("<!-- Written by prefixtune report. -->\n")
    assert not re.search(r"(?<!\\)[<>`]", own)
    assert "\\# no heading - no item 1. no number" in text
    assert "a \\| b \\\\\\| \\`code\\` \\*bold\\* \\[link\\](http://example.org) \\$x\\$" in text


def test_nothing_is_fetched(nasty: tuple[str, str]) -> None:
    taken = Page(nasty[0])
    assert {tag for tag, _ in taken.elements} & {"link", "img", "iframe", "object", "embed", "audio", "video"} == set()
    addresses = [a[key] for _, a in taken.elements for key in ("src", "href", "xlink:href", "action") if key in a]
    assert all((address or "").startswith("#") for address in addresses)
    style = "".join(data for name, data in taken.texts if name == "style")
    assert "url(" not in style
    assert "@import" not in style
    policy = next(a["content"] for a in taken.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy


def test_more_metrics_than_figures_are_bounded(tmp_path: Path) -> None:
    study_json(tmp_path, axis="prefix_length", factors=["prefix_length"])
    scores = {f"metric{index}": measure(1.0 + index) for index in range(80)}
    for length in (1, 2):
        folder = cell(tmp_path, {"method": "prefix", "prefix_length": length}, 1.0)
        stored = json.loads((folder / "evaluation.json").read_text())
        write(folder / "evaluation.json", {**stored, "scores": scores, "groups": {}})
    taken = Page(pages(tmp_path)[0])
    assert len([a for a in taken.all("svg") if a.get("class") == "chart"]) == 64
    assert "metric79 over prefix length: the figures" in taken.text()


def test_more_systems_and_parts_than_a_figure_holds_are_bounded(tmp_path: Path) -> None:
    study_json(tmp_path, axis="prefix_length", factors=["method", "prefix_length"])
    groups = {f"part {index}": {"num_examples": 1, "scores": {"bleu": measure(1.0)}} for index in range(40)}
    for index in range(200):
        folder = tmp_path / "cells" / str(index)
        factors = {"method": f"method {index}", "prefix_length": 1}
        write(folder / "cell.json", {"id": str(index), "factors": factors, "status": "done", "figures": {}})
        write(folder / "evaluation.json", {"scores": {"bleu": measure(1.0)}, "groups": {"kind": groups}})
    page, text = pages(tmp_path)
    assert "Parts drawn: 1; systems drawn: 30." in text
    assert len(page) < 20_000_000
    table = next(table for table in markdown_tables(text) if table[0][:2] == ["kind", "examples"])
    assert (len(table), len(table[0])) == (41, 202)


@pytest.mark.parametrize("make", [methods_study, low_data_study, length_study])
def test_the_page_is_sound(make: Any, tmp_path: Path) -> None:
    taken = Page(pages(make(tmp_path))[0])
    assert taken.all("html") == [{"lang": "en"}]
    identities = [attributes["id"] for _, attributes in taken.elements if "id" in attributes]
    assert len(identities) == len(set(identities))
    for name in ("aria-labelledby", "for"):
        for _, attributes in taken.elements:
            assert set((attributes.get(name) or "").split()) <= set(identities)
    for attributes in taken.all("a"):
        assert (attributes["href"] or "").removeprefix("#") in identities
    levels = [int(tag[1]) for tag, _ in taken.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert len(taken.all("caption")) == len(taken.all("table"))
    assert all(attributes.get("scope") in ("row", "col") for attributes in taken.all("th"))
    charts = [attributes for attributes in taken.all("svg") if attributes.get("class") == "chart"]
    assert charts
    assert all(attributes["role"] == "img" for attributes in charts)
    assert len(taken.all("desc")) == len(charts)


def test_equal_folders_give_equal_bytes(tmp_path: Path) -> None:
    study = low_data_study(tmp_path / "study")
    assert pages(study) == pages(study)


def test_the_contrast_is_known() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("rgb(0, 0, 0)", "#ffffff") == pytest.approx(21)


@pytest.mark.parametrize("number", [0, 1, 2], ids=["light", "dark", "print"])
def test_colors_have_enough_contrast(number: int, tmp_path: Path) -> None:
    page, _ = pages(training(tmp_path))
    root = re.findall(r":root \{(.*?)\}", page, flags=re.S)[number]
    colors = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]+);", root))
    for text in ("text", "quiet", "accent"):
        for ground in ("page", "sheet", "stripe", "best"):
            assert contrast(colors[text], colors[ground]) >= 4.5, (text, ground)
    assert contrast(colors["text"], colors["note"]) >= 4.5
    assert contrast(colors["good"], colors["sheet"]) >= 4.5
    for series in range(8):
        assert contrast(colors[f"s{series}"], colors["sheet"]) >= 3, series


def test_figures_use_the_colors_of_the_page(tmp_path: Path) -> None:
    page, _ = pages(methods_study(tmp_path))
    root = re.findall(r":root \{(.*?)\}", page, flags=re.S)[0]
    colors = {color: name for name, color in re.findall(r"--([a-z0-9-]+): (#[0-9a-f]+);", root)}
    assert {color: colors[color] for color in figures.VARIABLES if colors[color] != "page"} == figures.VARIABLES
    charts = re.findall(r'<svg class="chart".*?</svg>', page, flags=re.S)
    assert len(charts) == 4
    for chart in charts:
        # A color that is not a variable would stay as it is in dark mode.
        assert set(re.findall(r'(?:fill|stroke)="([^"]*)"', chart)) <= {
            f"var(--{v})" for v in figures.VARIABLES.values()
        } | {"none"}
        assert "style=" not in chart


def test_an_output_of_white_space_is_empty_in_both(tmp_path: Path) -> None:
    folder = evaluation(tmp_path, count=3)
    rows = [{**row, "output": output} for row, output in zip(examples(3, 1.0), ("", " ", "\n\t"), strict=True)]
    write_lines(folder / "outputs.jsonl", rows)
    page, markdown = pages(folder)
    assert (page.count("<em>empty</em>"), markdown.count("(empty)")) == (3, 3)


# --- figures as files ------------------------------------------------------------------------------------------------


def test_every_figure_is_written_in_four_formats(tmp_path: Path) -> None:
    document = compose([read_results(methods_study(tmp_path / "study"))])
    names = save_figures(document, tmp_path / "figures")
    assert names == [
        "bleu-by-type",
        "bleu-by-whether-the-category-was-seen-in-training",
        "training-loss-smoothed",
        "development-loss",
    ]
    files = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert set(files) == {f"{name}.{kind}" for name in names for kind in ("svg", "pdf", "png", "csv")}
    begins = {"svg": b"<?xml", "pdf": b"%PDF-", "png": b"\x89PNG", "csv": b"series,"}
    assert all(content.startswith(begins[name[-3:]]) for name, content in files.items())
    save_figures(document, tmp_path / "again")
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == files


def test_the_numbers_of_a_figure(tmp_path: Path) -> None:
    save_figures(compose([read_results(length_study(tmp_path / "study"))]), tmp_path)
    rows = list(csv.reader((tmp_path / "bleu-over-prefix-length.csv").read_text().splitlines()))
    assert rows[:2] == [["series", "prefix length", "BLEU", "low", "high"], ["prefix", "1.0", "52.0", "50.1", "53.9"]]
    assert len(rows) == 6
    rows = list(csv.reader((tmp_path / "bleu-by-type.csv").read_text().splitlines()))
    assert rows[1] == ["prefix length 1", "coffee shop (20)", "56.0", "54.1", "57.9"]


def test_figures_of_any_text_are_quiet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["_hidden", "$x_", "漢字 🍣", "\x00\x07\u202e", "x" * 500, "<b>&amp;"]
    groups = {
        "$kind$": {name: {"num_examples": 1, "scores": {"bleu": measure(1.0 + n)}} for n, name in enumerate(names)}
    }
    runs = [evaluation(tmp_path / str(n), 9.0, title=name, groups=groups) for n, name in enumerate(names)]
    document = compose([read_results(run) for run in runs])
    assert save_figures(document, tmp_path) == ["bleu-by-kind"]
    drawn = Page(re.findall(r'<svg class="chart".*?</svg>', to_html(document), flags=re.S)[0])
    labels = {text.strip() for name, text in drawn.texts if name == "text"}
    assert {"_hidden", "$x_", "漢字 🍣", "<b>&amp;", "_hidden (1)"} <= labels
    assert max(map(len, labels)) < 50
    assert caplog.records == []


def test_a_chart_too_many_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = compose([read_results(methods_study(tmp_path / "study"))])
    assert len(document.charts) == 4
    assert "Not drawn" not in to_html(document)
    monkeypatch.setattr("prefixtune.pages.page.MOST_FIGURES", 3)
    page = to_html(document)
    assert page.count('<svg class="chart"') == 3
    assert page.count("<p>Not drawn: the page has 3 charts.</p>") == 1
    assert page.count("<figure>") == 4
    assert len(save_figures(document, tmp_path / "figures")) == 3


def test_figures_do_not_follow_the_settings_of_the_user(tmp_path: Path) -> None:
    import matplotlib

    document = compose([read_results(training(tmp_path / "run"))])
    page = to_html(document)
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.grid": False}):
        assert to_html(document) == page
        assert matplotlib.rcParams["font.size"] == 30


# --- broken folders --------------------------------------------------------------------------------------------------


def damaged(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: f / "nowhere", "does not exist"),
        (lambda f: f, "holds no run"),
        (lambda f: training(f) / "events.jsonl", "holds no study; a training run has an events.jsonl"),
        (lambda f: damaged(evaluation(f), "evaluation.json", "{"), "evaluation.json' is not JSON"),
        (lambda f: damaged(evaluation(f), "evaluation.json", "[]"), "must be an object"),
        (lambda f: damaged(evaluation(f), "evaluation.json", "{}"), "'scores' in .*evaluation.json' is missing"),
        (lambda f: evaluation(f, scores={"bleu": {"score": "high"}}), "'score' in 'bleu' in .* must be a number"),
        (lambda f: evaluation(f, scores={"bleu": {"score": 1, "interval": [1]}}), "must be two numbers"),
        (lambda f: evaluation(f, num_examples="many"), "'num_examples' in .* must be a whole number"),
        (lambda f: damaged(evaluation(f), "outputs.jsonl", '{"number": 1}\n{"num\n'), "line 2 of .*outputs.jsonl"),
        (
            lambda f: damaged(evaluation(f), "outputs.jsonl", '{"references": [1]}\n'),
            "item 1 in 'references' in line 1 of .* must be text",
        ),
        (lambda f: damaged(training(f), "events.jsonl", '{"event"\n{"event": "end"}\n'), "line 1 of .*events.jsonl"),
        (lambda f: damaged(training(f), "events.jsonl", '{"event": "step", "step": "one"}\n'), "must be a number"),
        (lambda f: damaged(training(f), "config.toml", "= 1"), "config.toml' is not TOML"),
        (lambda f: damaged(methods_study(f), "study.json", '{"cut": "all"}'), "'cut' in .* must be a list"),
        (lambda f: damaged(methods_study(f), "comparisons.json", '{"points": [1]}'), "must be an object"),
        (
            lambda f: damaged(methods_study(f), "cells/lora/cell.json", '{"status": "gone"}'),
            "must be one of 'done'",
        ),
    ],
)
def test_broken_folders_are_named_with_a_way_out(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_results(make(tmp_path))
    assert str(tmp_path) in caught.value.message
    assert caught.value.hint


def test_a_study_without_cells(tmp_path: Path) -> None:
    study_json(tmp_path)
    with pytest.raises(DataError, match="has no cells"):
        read_results(tmp_path)


def test_a_folder_of_runs_names_one(tmp_path: Path) -> None:
    evaluation(tmp_path / "e2e")
    with pytest.raises(DataError) as caught:
        read_results(tmp_path)
    assert caught.value.hint == f"did you mean {str(tmp_path / 'e2e')!r}?"


def test_a_study_of_which_nothing_is_done_still_renders(tmp_path: Path) -> None:
    study_json(tmp_path, tuning={"prefix": {"learning_rate": {"0.001": None}, "chosen": None}}, metric=None)
    cell(tmp_path, {"method": "prefix"}, None, status="waiting")
    page, text = pages(tmp_path)
    assert "0 of 1 cells are done, 1 wait" in html.unescape(page)
    assert "| prefix | 0 of 1 |" in text


def test_the_backbone_is_the_one_that_the_log_names(tmp_path: Path) -> None:
    folder = training(tmp_path)
    log = folder / "events.jsonl"
    log.write_text(log.read_text().replace('"event": "start"', '"event": "start", "backbone": "my-model"', 1))
    run = read_results(folder)
    assert isinstance(run, results.Run)
    assert run.config["backbone"] == "my-model"
    assert "smollm2-135m" not in pages(folder)[1]
