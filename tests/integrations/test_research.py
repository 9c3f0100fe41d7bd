"""A small study of the toy set: every run is scored once, a killed study goes on, points are compared, by Ray too."""

import json
import os
import sys
from pathlib import Path

import pytest

from prefixtune.errors import DataError
from research import study as module
from research.compare import compare, compare_over_sizes, load
from research.memories import field, joined
from research.study import Cell, Study, cells, read_study, run, run_on_ray
from research.tables import main
from zoo import store_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return store_model(tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=1)


@pytest.fixture
def study(tmp_path, model):
    return Study(
        output=str(tmp_path / "runs"),
        task="toy",
        train="train",
        dev="held_out",
        test="held_out",
        sizes=[8],
        samples=2,
        dev_limit=4,
        test_limit=3,
        try_steps=1,
        decoding={"max_new_tokens": 4, "num_beams": 1},
        settings={"backbone": model, "dtype": "float32", "batch_size": 4, "max_steps": 2},
        points={
            "prefix": {"prefix_length": 3, "init_text": "abc", "learning_rates": [1e-3, 1e-2]},
            "lora": {"method": "adapter", "learning_rate": 1e-3},
            "bare": {"method": "none", "init_text": "Describe it:"},
        },
    )


def test_a_study_is_done_once_and_goes_on(study, monkeypatch, capsys, tmp_path):
    folder, trained = Path(study.output), []
    import prefixtune as pt

    train = pt.train

    def noted(config, **more):
        trained.append(Path(config.output).name)
        if len(trained) == 5:
            raise KeyboardInterrupt
        return train(config, **more)

    monkeypatch.setattr(pt, "train", noted)
    with pytest.raises(KeyboardInterrupt):
        run(study)
    assert set(run(study).values()) == {"done"}
    # Two tries of a rate; one run was interrupted, and is the only one that was begun twice.
    assert len(trained) == 2 + 4 + 1
    assert trained[:3] == ["prefix-n8-0.001-s0", "prefix-n8-0.01-s0", "prefix-n8-s0"]
    names = {cell.name for cell in cells(study)}
    assert len(names) == 6
    assert {path.parent.name for path in folder.glob("*/evaluation.json")} == names
    run(study)
    assert len(trained) == 7
    stored = json.loads((folder / "prefix-n8-s1" / "evaluation.json").read_text())
    losses = json.loads((folder / "rates" / "prefix-n8.json").read_text())
    assert stored["training"]["learning_rate"] == float(min(losses, key=losses.__getitem__))
    assert (stored["num_examples"], stored["sample"]) == (3, 1)
    found = compare(study, "bleu")
    assert found[["point", "samples"]].values.tolist() == [["lora", 2], ["bare", 2]]
    file = tmp_path / "small.toml"
    values = {name: json.dumps(getattr(study, name)) for name in ("output", "task", "train", "dev", "test")}
    points = "".join(f"[points.{name}]\n" for name in study.points)
    file.write_text("".join(f"{name} = {value}\n" for name, value in values.items()) + f"sizes = [8]\n{points}")
    capsys.readouterr()
    assert main([str(file)]) == 0
    assert "bleu: difference from prefix" in capsys.readouterr().out


def store(study, scores, outputs=(), size=8):
    for point, values in scores.items():
        for number, value in enumerate(values, study.first_sample):
            folder = Path(study.output) / Cell(point, size, number).name
            folder.mkdir(parents=True)
            (folder / "evaluation.json").write_text(json.dumps({"scores": {"bleu": {"score": value}}}))
            rows = [{"number": n, "references": ["a b c d e"], "output": text} for n, text in enumerate(outputs)]
            (folder / "outputs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_differences_are_paired_and_corrected(study):
    study.samples = 3
    store(study, {"prefix": (10.0, 20.0, 30.0), "lora": (11.0, 22.0, 33.0), "bare": (10.0, 20.0, 30.0)})
    assert len(load(study)) == 9
    lora, bare = compare(study, "bleu").to_dict("records")
    # Student's t of 1, 2, 3: from a table.
    assert (lora["difference"], lora["samples"]) == (2.0, 3)
    assert (lora["low"], lora["high"]) == pytest.approx((-0.484, 4.484), abs=1e-3)
    assert lora["p_value"] == pytest.approx(0.0742, abs=1e-4)
    assert lora["corrected"] == pytest.approx(2 * 0.0742, abs=2e-4)
    assert (bare["low"], bare["high"]) == (0.0, 0.0)
    assert bare["p_value"] != bare["p_value"], "there is no chance to test"


def test_a_claim_over_sizes_is_tested_on_the_means_of_each_sample(study):
    study.samples, study.first_sample, study.sizes = 4, 100, [8, 16]
    store(study, {"prefix": (10.0, 20.0, 30.0, 40.0), "lora": (10.0, 21.0, 33.0, 48.0)})
    # The last sample is not done at this size: it does not count.
    store(study, {"prefix": (0.0, 0.0, 0.0, 0.0), "lora": (2.0, 3.0, 3.0)}, size=16)
    (lora,) = compare_over_sizes(study, "bleu").to_dict("records")
    assert (lora["point"], lora["difference"], lora["samples"]) == ("lora", 2.0, 3)
    assert (lora["low"], lora["high"]) == pytest.approx((-0.484, 4.484), abs=1e-3)
    assert lora["corrected"] == lora["p_value"] == pytest.approx(0.0742, abs=1e-4)


def test_rates_are_chosen_on_samples_that_do_not_count(study, monkeypatch):
    study.first_sample, study.rate_samples, study.rate_size = 100, [90, 91], 4
    study.steps, study.try_steps = {4: 3, 8: 5}, 0
    losses = {(1e-3, 90): 1.0, (1e-3, 91): 4.0, (1e-2, 90): 3.0, (1e-2, 91): 1.5}
    tried = []

    def train(study, cell, config):
        tried.append((config.learning_rate, cell.sample, config.seed, config.output))
        assert (cell.size, config.max_steps) == (4, 3), "the size that rates are chosen at"
        return {"dev_loss": losses[config.learning_rate, cell.sample]}

    monkeypatch.setattr(module, "_train", train)
    assert [cell.sample for cell in cells(study)] == [100] * 3 + [101] * 3
    assert module._choose_rate(study, cells(study)[0], [1e-3, 1e-2]) == 1e-2
    assert [one[:3] for one in tried] == [(1e-3, 90, 90), (1e-3, 91, 91), (1e-2, 90, 90), (1e-2, 91, 91)]
    assert len({one[3] for one in tried}) == 4, "each goes on by itself"


def test_one_sample_is_compared_item_by_item(study):
    study.samples = 1
    store(study, {"prefix": (10.0,)}, outputs=("a b c d e",) * 9)
    store(study, {"lora": (5.0,)}, outputs=("a b x x x",) * 9)
    store(study, {"bare": (10.0,)}, outputs=("a b c d e",) * 9)
    lora, bare = compare(study, "bleu").to_dict("records")
    assert lora["p_value"] < 0.02
    assert bare["p_value"] == 1


def test_a_cluster_does_the_same(study):
    pytest.importorskip("ray")
    small = study.model_copy(update={"samples": 1, "points": {name: study.points[name] for name in ("lora", "bare")}})
    states = run_on_ray(small, "local")
    assert states == {"lora-n8-s0": "done", "bare-n8-s0": "done"}
    assert len(load(small)) == 2


def test_every_study_can_be_read(tmp_path):
    for path in sorted((ROOT / "research" / "studies").glob("*.toml")):
        study = read_study(path, "sets")
        assert study.train.startswith("sets" + os.sep)
        for cell in cells(study):
            settings = study.settings_of(cell.point, cell.size)
            if settings.get("method") != "none":
                settings.pop("learning_rates", None)
                assert module._config(study, settings, tmp_path, 0).output == str(tmp_path)
    (tmp_path / "wrong.toml").write_text("task = 1\n")
    with pytest.raises(DataError):
        read_study(tmp_path / "wrong.toml")


def test_memories_and_what_else_can_be_made_of_documents(tmp_path, monkeypatch):
    model = store_model(tmp_path / "model", "llama", num_hidden_layers=1, max_position_embeddings=2048)
    rows = [{"question": f"Where to, {n}?", "answer": "Ashby"} for n in range(8)]
    for name in ("four-1", "four-2"):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        (folder / "document.txt").write_text("Trains.\nThe Owl goes to Ashby.\nThe Fox goes to Dover.")
        for part, some in (("train", rows), ("test", rows[:2])):
            (folder / f"{part}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in some))
    data, made, results = str(tmp_path / "data"), str(tmp_path / "made"), tmp_path / "field.json"
    small = ["--backbone", model, "--steps", "1", "--length", "4"]
    monkeypatch.setattr(sys, "argv", ["joined", data, made, *small])
    joined.main()
    monkeypatch.setattr(sys, "argv", ["field", data, made, str(results)])
    field.main()
    found, ours = (json.loads(path.read_text()) for path in (results, tmp_path / "made" / "joined.json"))
    assert all(ours[name] == figures for name, figures in found["ours"].items() if name in ours)
    # The control: a text, and its own keys and values as a prefix; and what one adapter alone is.
    assert found["own_keys"]["alone"] == {
        **found["view"]["alone"],
        "loss": pytest.approx(found["view"]["alone"]["loss"]),
    }
    assert found["bare"]["alone"]["loss"] != found["view"]["alone"]["loss"]
    assert found["lora"]["alone"] == found["lora_sum"]["alone"]
    # The documents are alike: the mean of two equal adapters is the adapter.
    assert found["lora"]["joined_2"]["loss"] == pytest.approx(found["lora"]["alone"]["loss"])
    assert found["lora_sum"]["joined_2"]["loss"] != found["lora"]["joined_2"]["loss"]
    assert min(found["first_token"].values()) > 0
