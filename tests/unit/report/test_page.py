"""Reports of made-up folders: what a reader finds in the page, and what broken folders say."""

import csv
import itertools
import json
import math
import re
from html.parser import HTMLParser

import pytest

from contrast import contrast
from made_up_runs import evaluation, examples, five_runs, measure, training, write, write_lines
from prefixtune.errors import DataError
from prefixtune.pages.format import short
from prefixtune.report import compose, read_results, save_figures, to_html

NASTY = (
    "</script><script>alert(1)</script>",
    '<img src="http://example.org/x.png" onerror=alert(1)>',
    "\u202eright to left\u2028line separator\x00\x07\x85",
    "&lt;already&gt; &amp; café 漢字 🍣",
)
VOID = {"meta", "link", "input", "br", "hr", "img"}


def page_of(*folders, title=""):
    return to_html(compose([read_results(folder) for folder in folders], title))


class Page(HTMLParser):
    """A page taken apart; complains about tags that do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.open = []
        self.texts = []
        self.tables = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))
        if {"td", "th"} & set(self.open):
            small = f" {data}" if self.open[-1] == "small" else data
            self.tables[-1][-1][-1] += small

    def text(self):
        return "".join(data for name, data in self.texts if name not in ("script", "style"))

    def all(self, name):
        return [attributes for tag, attributes in self.elements if tag == name]

    def table(self, *heads):
        """The rows of the first table with these columns."""
        return next(table[1:] for table in self.tables if table[0][: len(heads)] == list(heads))

    def column(self, head):
        """A column of the first table, by the first cell of each row."""
        names, *rows = self.tables[0]
        return {row[0]: row[names.index(head)] for row in rows}


# --- what is in it ---------------------------------------------------------------------------------------------------


def test_scores_costs_and_the_best(tmp_path):
    page = Page(page_of(*five_runs(tmp_path)))
    # The best, but not by more than chance: the interval of the prefix reaches to 64.30.
    assert page.column("BLEU")["fine-tuning"] == "63.90 (best) [62.00, 65.80]"
    assert page.column("BLEU")["prefix"] == "62.40 [60.50, 64.30]"
    # Of TER the lowest is best: 0.95 - 63.9 / 120.
    assert page.column("TER lower is better")["fine-tuning"].startswith("0.4175 (best) [")
    assert page.column("parameters trained")["prefix"] == "1,234,432 92,160 stored"
    assert page.column("file size")["prefix"] == "371 kB"
    assert page.column("training time")["prefix"] == "4 min 160 steps"


def test_evaluations_of_the_same_data_are_shown_side_by_side(tmp_path):
    one = evaluation(training(tmp_path / "one"), 60.0, title="prefix")
    two = evaluation(tmp_path / "two", 6.1, title="bare model", data="elsewhere/test.jsonl.gz")
    page = Page(page_of(one, two))
    assert page.column("BLEU") == {
        "prefix": "60.00★ (best, significant) [58.10, 61.90]",
        "bare model": "6.10 [4.20, 8.00]",
    }
    assert "-53.90 BLEU from prefix to bare model" in page.text()
    assert page.column("file size") == {"prefix": "371 kB", "bare model": "n/a"}
    assert "= a reference" in page.text()


def test_a_star_needs_a_difference_beyond_chance(tmp_path):
    first, near, far = (
        evaluation(tmp_path / title, title=title, scores={"bleu": measure(score, 1.9)}, groups={})
        for title, score in (("first", 60.0), ("near", 57.4), ("far", 57.2))
    )
    # The interval of a difference reaches sqrt(1.9^2 + 1.9^2) = 2.69 to either side.
    assert Page(page_of(first, near)).column("BLEU")["first"] == "60.00 (best) [58.10, 61.90]"
    assert Page(page_of(first, far)).column("BLEU")["first"].startswith("60.00★ (best, significant)")
    # Without intervals nothing is known about chance.
    bare = [evaluation(tmp_path / str(score), score, title=str(score), width=0.0) for score in (60.0, 6.0)]
    assert Page(page_of(*bare)).column("BLEU")["60.0"] == "60.00 (best)"


def test_figures_that_are_missing_or_no_numbers_are_said(tmp_path):
    folder = evaluation(training(tmp_path / "run"))
    values = json.loads((folder / "evaluation.json").read_text())
    values["scores"]["bleu"] |= {"score": math.nan, "interval": None}
    values["scores"]["ter"]["score"] = None
    values["groups"]["seen"]["seen"]["scores"] = {}
    write(folder / "evaluation.json", values)
    write_lines(folder / "events.jsonl", [{"event": "step", "step": n, "loss": math.nan} for n in (1, 2)])
    page = page_of(folder)
    assert Page(page).column("BLEU")["prefix"] == "n/a"
    assert "no finite BLEU." in Page(page).text()
    assert "nan" not in page.lower()


def test_a_training_run_shows_its_losses(tmp_path):
    page = Page(page_of(training(tmp_path / "run", end=False)))
    assert "the log has no end" in page.text()
    losses = page.table("curve", "optimizer step", "loss per token")
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    development = {f"{e['step']}": short(e["loss"]) for e in events if e["event"] == "evaluation"}
    assert {row[1]: row[2] for row in losses if row[0] == "development"} == development
    # The step's own loss is a sum over the target; shown is that of a token, as for the development data.
    assert all(float(row[2]) < 4 for row in losses)
    assert ["learning_rate", "0.001"] in page.table("setting", "value")


def test_settings_that_differ_are_shown_apart_from_equal_ones(tmp_path):
    runs = [evaluation(training(tmp_path / str(seed), seed=seed), title=f"run {seed}") for seed in (0, 7)]
    page = Page(page_of(*runs, evaluation(tmp_path / "bare", 6.1, title="bare")))
    differing = {row[0]: row[1:] for row in page.table("setting", "run 0", "run 7", "bare")}
    assert differing["seed"] == ["0", "7", "n/a"]
    equal = dict(page.table("setting", "value"))
    # The bare model has no learning rate, which makes that of the others no less equal.
    assert equal["learning_rate"] == "0.001"
    assert equal["evaluation: decoding.num_beams"] == "5"
    assert equal["version: torch"] == "2.13.0"


def test_outputs_are_sampled_evenly_and_bounded(tmp_path, monkeypatch):
    folder = evaluation(tmp_path / "one", count=100)
    page = Page(page_of(folder))
    assert [f"Example {n}" in page.text() for n in (1, 50, 100)] == [True] * 3
    assert "The other 80 examples" in page.text()
    monkeypatch.setattr("prefixtune.report.details.MOST_OTHERS", 30)
    shown = Page(page_of(folder)).text()
    assert len(re.findall(r"Example \d+", shown)) == 50
    assert "50 more examples are left out" in shown
    # Outputs of another source do not stand beside it; white space is no output.
    rows = [{**row, "output": " "} for row in examples(100, 0.5)]
    rows[0]["source"] = "name : Elsewhere"
    write_lines(evaluation(tmp_path / "two", title="two", count=100, data="test.jsonl") / "outputs.jsonl", rows)
    (folder / "outputs.jsonl").unlink()
    assert Page(page_of(tmp_path / "two")).text().count("empty") == 50


# --- the page as such ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nasty(tmp_path_factory):
    """A page of which every text is an attack or a stumbling block."""
    folder = tmp_path_factory.mktemp("nasty")
    rows = [
        {"number": n, "source": text, "references": [text, ""], "output": text, "groups": {"category": text}}
        for n, text in enumerate((*NASTY, ""), start=1)
    ]
    attack = NASTY[0]
    evaluation(
        folder,
        **dict.fromkeys(("title", "method", "backbone", "data", "task"), attack),
        scores={attack: measure(1.0, name=attack)},
        groups={attack: {attack: {"num_examples": 1, "scores": {attack: measure(1.0)}}}},
        settings={attack: {attack: attack}},
    )
    write_lines(folder / "outputs.jsonl", rows)
    return page_of(folder, title=attack)


def test_texts_stay_texts_and_nothing_is_fetched(nasty):
    taken = Page(nasty)
    assert len(taken.all("script")) == 1
    assert not any(key.startswith("on") or key == "style" for _, attributes in taken.elements for key in attributes)
    assert nasty.count("<script") == nasty.count("</script>") == 1
    assert all(text in taken.text() for text in (*NASTY[:2], NASTY[3]))
    assert not re.search("[\x00-\x08\x7f-\x9f\ud800-\udfff]", nasty)
    loading = {"link", "img", "iframe", "object", "embed", "audio", "video"}
    assert {tag for tag, _ in taken.elements} & loading == set()
    addresses = [a[key] for _, a in taken.elements for key in ("src", "href", "xlink:href", "action") if key in a]
    assert all((address or "").startswith("#") for address in addresses)
    style = "".join(data for name, data in taken.texts if name == "style")
    assert "url(" not in style
    assert "@import" not in style
    policy = next(a["content"] for a in taken.all("meta") if a.get("http-equiv") == "Content-Security-Policy") or ""
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy


def test_the_page_is_sound(tmp_path):
    runs = five_runs(tmp_path)
    page = page_of(*runs)
    assert page_of(*runs) == page
    taken = Page(page)
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
    charts = [attributes for attributes in taken.all("svg") if attributes.get("class") == "chart"]
    assert len(charts) == len(taken.all("desc")) == 4


def test_colors_have_enough_contrast(tmp_path):
    roots = re.findall(r":root \{(.*?)\}", page_of(training(tmp_path)), flags=re.S)
    # On screens by day and by night, and on paper.
    assert len(roots) >= 3
    for root in roots[:3]:
        colors = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]+);", root))
        for text, ground in itertools.product(("text", "quiet", "accent"), ("page", "sheet", "stripe")):
            assert contrast(colors[text], colors[ground]) >= 4.5, (text, ground)
        for series in range(8):
            assert contrast(colors[f"s{series}"], colors["sheet"]) >= 3, series


# --- figures as files ------------------------------------------------------------------------------------------------


def test_every_figure_is_written_in_four_formats(tmp_path):
    document = compose([read_results(run) for run in five_runs(tmp_path)])
    names = save_figures(document, tmp_path / "figures")
    seen = "bleu-by-whether-the-category-was-seen-in-training"
    assert names == ["bleu-by-type", seen, "training-loss-smoothed", "development-loss"]
    files = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert set(files) == {f"{name}.{kind}" for name in names for kind in ("svg", "pdf", "png", "csv")}
    begins = {"svg": b"<?xml", "pdf": b"%PDF-", "png": b"\x89PNG", "csv": b"series,"}
    assert all(content.startswith(begins[name[-3:]]) for name, content in files.items())
    rows = list(csv.reader(files["bleu-by-type.csv"].decode().splitlines()))
    assert rows[1][:2] == ["prefix", "coffee shop (20)"]
    assert [float(text) for text in rows[1][2:]] == pytest.approx([66.4, 64.5, 68.3])


def test_figures_of_any_text_are_quiet(tmp_path, caplog):
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


# --- broken folders --------------------------------------------------------------------------------------------------


def damaged(folder, name, text):
    (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda f: f / "nowhere", "nowhere"),
        (lambda f: f, "no run"),
        (lambda f: training(f) / "events.jsonl", "events.jsonl"),
        (lambda f: damaged(evaluation(f), "evaluation.json", "{"), "evaluation.json"),
        (lambda f: evaluation(f, scores={"bleu": {"score": "high"}}), "scores.bleu.score"),
        (lambda f: damaged(evaluation(f), "outputs.jsonl", '{"number": 1}\n{"num\n'), "line 2 of .*outputs.jsonl"),
        (lambda f: damaged(training(f), "events.jsonl", '{"event"\n{"event": "end"}\n'), "line 1 of .*events.jsonl"),
        (lambda f: damaged(training(f), "config.toml", "= 1"), "config.toml"),
    ],
)
def test_broken_folders_are_named_with_a_way_out(make, named, tmp_path):
    with pytest.raises(DataError, match=named) as caught:
        read_results(make(tmp_path))
    assert str(tmp_path) in caught.value.message
    assert caught.value.hint


def test_a_log_that_is_still_written_is_read(tmp_path):
    log = training(tmp_path) / "events.jsonl"
    log.write_text(log.read_text()[:-5])
    assert "the log has no end" in Page(page_of(tmp_path)).text()
