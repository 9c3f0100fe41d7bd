"""BERTScore, MoverScore and BLEURT: nothing is fetched, and what is missing is named; stand-ins for the packages.

The packages and their weights are not on the machines that run the tests, so no figure of theirs is checked here.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prefixtune.evaluation.metrics import Unavailable, compute, measure

NAMES = {"bertscore": "bert-score", "moverscore": "moverscore", "bleurt": "bleurt-pytorch"}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """All three packages seem to be installed."""
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "9.9" if name in NAMES.values() else real(name))


@pytest.mark.parametrize(("metric", "package"), NAMES.items())
def test_a_missing_package_is_named(metric: str, package: str, monkeypatch: pytest.MonkeyPatch):
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(Unavailable, match=f"{package} is not installed.*pip install {package}.*none are downloaded"):
        compute(["a"], [["a"]], metrics=[metric])


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("metric", NAMES)
def test_missing_weights_are_named(metric: str, tmp_path: Path):
    with pytest.raises(Unavailable, match=f"{metric} needs model weights, which are not downloaded"):
        compute(["a"], [["a"]], metrics=[metric])
    with pytest.raises(Unavailable, match=f"the weights of {metric} are not in"):
        compute(["a"], [["a"]], metrics=[metric], weights={metric: str(tmp_path / "nowhere")})


@pytest.mark.usefixtures("installed")
def test_a_package_that_cannot_be_imported_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bleurt_pytorch", None)
    with pytest.raises(Unavailable, match="bleurt_pytorch is installed but cannot be imported here"):
        compute(["a"], [["a"]], metrics=["bleurt"], weights={"bleurt": str(tmp_path)})


@pytest.mark.usefixtures("installed")
def test_bertscore_takes_the_folder_and_its_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 24}', encoding="utf-8")
    asked: dict[str, Any] = {}

    def score(outputs: list[str], references: list[list[str]], **options: Any) -> Any:
        asked.update(options)
        found = torch.tensor([0.5] * len(outputs))
        return found, found, found

    monkeypatch.setitem(sys.modules, "bert_score", SimpleNamespace(score=score))
    made = measure(["a", ""], [["a"], ["b"]], metrics=["bertscore"], weights={"bertscore": str(tmp_path)})["bertscore"]
    assert asked["model_type"] == str(tmp_path)
    assert asked["num_layers"] == 17
    assert made.score == 0.25  # an empty text scores 0
    assert made.part([0]).score == 0.5
    assert f"bert-score 9.9 (F1, {tmp_path.name}, layer 17 of 24)" in made.statistics.implementation


@pytest.mark.usefixtures("installed")
def test_moverscore_takes_the_best_reference_and_fetches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def word_mover_score(references: list[str], outputs: list[str], *rest: Any, **options: Any) -> list[float]:
        return [float(one == other) for one, other in zip(references, outputs, strict=True)]

    package = SimpleNamespace(word_mover_score=word_mover_score, process=lambda text: {ord(sign) for sign in text})
    monkeypatch.setitem(sys.modules, "moverscore", package)
    monkeypatch.delenv("MOVERSCORE", raising=False)
    weights = {"moverscore": str(tmp_path)}
    with pytest.raises(Unavailable, match=r"needs MNLI_BERT\.zip in"):
        compute(["a"], [["a"]], metrics=["moverscore"], weights=weights)
    (tmp_path / "MNLI_BERT.zip").write_bytes(b"")
    monkeypatch.setenv("MOVERSCORE", "restored afterwards")
    made = compute(["a", "b"], [["x", "a"], ["c"]], metrics=["moverscore"], weights=weights)["moverscore"]
    assert made.score == 0.5


@pytest.mark.usefixtures("installed")
def test_bleurt_is_the_mean_over_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Tokenizer:
        @classmethod
        def from_pretrained(cls, folder: str) -> Tokenizer:
            assert folder == str(tmp_path)
            return cls()

        def __call__(self, references: list[str], outputs: list[str], **options: Any) -> dict[str, Any]:
            return {"same": [one == other for one, other in zip(references, outputs, strict=True)]}

    class Model(Tokenizer):
        def eval(self) -> Model:
            return self

        def __call__(self, same: list[bool]) -> Any:  # type: ignore[override]
            return SimpleNamespace(logits=torch.tensor(same, dtype=torch.float32)[:, None])

    package = SimpleNamespace(BleurtTokenizer=Tokenizer, BleurtForSequenceClassification=Model)
    monkeypatch.setitem(sys.modules, "bleurt_pytorch", package)
    weights = {"bleurt": str(tmp_path)}
    made = measure(["a", "b"], [["x", "a"], ["b"]], metrics=["bleurt"], weights=weights)["bleurt"]
    assert (made.part([0]).score, made.score) == (0.5, 0.75)
