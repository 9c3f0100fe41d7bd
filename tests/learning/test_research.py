"""A small study of the toy set: every run is scored once, a killed study goes on, and points are compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from research.compare import compare, holm
from research.study import Cell, Study, cells, run, sample_targets
from zoo import make_model, make_tokenizer


@pytest.fixture
def study(tmp_path: Path) -> Study:
    tokenizer = make_tokenizer()
    make_model("llama", tokenizer, num_hidden_layers=1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
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
        settings={"backbone": str(tmp_path / "model"), "dtype": "float32", "batch_size": 4, "max_steps": 2},
        points={
            "prefix": {"prefix_length": 3, "init_text": "abc", "learning_rates": [1e-3, 1e-2]},
            "lora": {"method": "adapter", "learning_rate": 1e-3},
            "bare": {"method": "none", "init_text": "Describe it:"},
        },
    )


def test_a_study_is_done_once_and_goes_on(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, trained = Path(study.output), []
    import prefixtune as pt

    train = pt.train

    def noted(config: Any, **more: Any) -> Any:
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
    assert trained[:3] == ["prefix-n8-0.001", "prefix-n8-0.01", "prefix-n8-s0"]
    names = {cell.name for cell in cells(study)}
    assert len(names) == 6
    assert {path.parent.name for path in folder.glob("*/evaluation.json")} == names
    run(study)
    assert len(trained) == 7
    stored = json.loads((folder / "prefix-n8-s1" / "evaluation.json").read_text())
    losses = json.loads((folder / "rates" / "prefix-n8.json").read_text())
    assert stored["training"]["learning_rate"] == float(min(losses, key=losses.__getitem__))
    assert (stored["num_examples"], stored["sample"]) == (3, 1)
    found = compare(study, next(iter(stored["scores"])))
    assert [(each.point, len(each.differences)) for each in found] == [("lora", 2), ("bare", 2)]


def test_differences_are_paired_and_corrected(study: Study) -> None:
    pytest.importorskip("scipy")
    scores = {"prefix": (10.0, 20.0, 30.0), "lora": (11.0, 22.0, 33.0), "bare": (10.0, 20.0, 30.0)}
    study.samples = 3
    for point, values in scores.items():
        for number, value in enumerate(values):
            folder = Path(study.output) / Cell(point, 8, number).name
            folder.mkdir(parents=True)
            (folder / "evaluation.json").write_text(json.dumps({"scores": {"bleu": {"score": value}}}))
    lora, bare = compare(study, "bleu")
    # Student's t of 1, 2, 3: from a table.
    assert lora.differences == (1.0, 2.0, 3.0)
    assert lora.interval == pytest.approx((-0.484, 4.484), abs=1e-3)
    assert lora.p_value == pytest.approx(0.0742, abs=1e-4)
    assert lora.corrected == pytest.approx(2 * 0.0742, abs=2e-4)
    assert (bare.interval, bare.p_value) == ((0.0, 0.0), None)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_samples_are_equal_for_every_point(study: Study) -> None:
    examples = study.read("train")
    drawn = sample_targets(examples, 8, "train/0")
    assert drawn == sample_targets(examples, 8, "train/0") != sample_targets(examples, 8, "train/1")
    assert sum(len(example.targets) for example in drawn) == 8
    assert sample_targets(examples, 0, "any") == examples
