"""`prefixtune explain`: the page, the figures and the JSON that it writes; what a stop leaves."""

import json

import pytest

from command_line import run
from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.prefixes import make_header
from prefixtune.cli.main import main
from prefixtune.explain.subject import TITLES, View
from prefixtune.prefix.prefix import Prefix, save_prefix
from prefixtune.training.starts.words import from_words

TEXT_FORMAT = {"prompt": "{source} =", "target": " {target}", "source": "name", "target_template": "text"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, save_model, random_prefix, save_random_prefix):
    """A model, two prefixes and some rows."""
    folder = tmp_path_factory.mktemp("explain")
    save_model(folder / "model", max_position_embeddings=512)
    backbone = load_backbone(folder / "model", device="cpu", dtype="float32")
    start = from_words(backbone, "some words", 3)
    moved = random_prefix(backbone, 3, 1, 0.3).detach()
    pairs = zip(start.layers["decoder"], moved.layers["decoder"], strict=True)
    layers = tuple((key + more_key, value + more_value) for (key, value), (more_key, more_value) in pairs)
    facts = {"task": "records", "text_format": TEXT_FORMAT}
    header = make_header(backbone, **facts, initialization={"kind": "words", "text": "some words"})
    save_prefix(folder / "a.safetensors", Prefix({"decoder": layers}, header))
    save_random_prefix(folder / "b.safetensors", backbone, 2, 2, **facts)
    rows = [{"name": f"row {letter}", "text": f"{letter} it is <b>"} for letter in "abcdefgh"]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_page_holds_every_view_and_the_numbers_are_json(folder, tmp_path):
    page, figures = tmp_path / "page.html", tmp_path / "figures"
    words = ["explain", str(folder / "a.safetensors"), "--data", str(folder / "rows.jsonl"), "--rows", "4"]
    words += ["--against", str(folder / "b.safetensors"), "--output", str(page), "--figures", str(figures)]
    out, err = run(*words, "--device", "cpu", "--dtype", "float32", "--json")
    assert err == ""
    found = json.loads(out)
    assert list(found["views"]) == list(TITLES)
    assert not [view for view in found["views"].values() if "left_out" in view]
    loss = found["views"]["loss"]
    assert loss["rows"] == 4
    assert loss["controls"].keys() == {"random", "shuffled", "other"}
    html = page.read_text()
    assert "<b>" not in html
    assert "://" not in html  # nothing is fetched
    assert html.count('<svg class="chart"') == len(found["figures"]) == 3
    assert {path.name for path in figures.iterdir()} == {
        f"{name}.{kind}" for name in found["figures"] for kind in ("svg", "pdf", "png", "csv")
    }


def test_data_of_joined_prefixes_are_read_as_the_joined_one_reads_them(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PREFIXTUNE_HOME", str(tmp_path / "home"))
    backbone = load_backbone(folder / "model", device="cpu", dtype="float32")
    style = tmp_path / "style.safetensors"
    save_prefix(style, Prefix(from_words(backbone, "in style", 2).layers, make_header(backbone)))
    both = f"{style}+{folder / 'a.safetensors'}"
    words = ["--data", str(folder / "rows.jsonl"), "--rows", "2", "--views", "loss", "--json"]
    found = json.loads(run("explain", both, *words, "--device", "cpu")[0])
    # In the user's data folder: they lie in different ones.
    assert found["page"] == str(tmp_path / "home" / "data" / "explain" / "style+a.html")
    assert (found["task"], found["prefix_length"]) == ("records", {"decoder": 5})


def test_a_stopped_run_keeps_the_views_that_are_done(folder, tmp_path, monkeypatch):
    def stopped(*_, **__):
        yield View("loss", left_out="of no matter.")
        raise KeyboardInterrupt

    monkeypatch.setattr("prefixtune.explain.explain.explain", stopped)
    page = tmp_path / "page.html"
    words = ["--data", str(folder / "rows.jsonl"), "--output", str(page), "--device", "cpu"]
    assert main(["explain", str(folder / "a.safetensors"), *words]) == 130
    assert "Loss with parts left out is left out" in page.read_text()
