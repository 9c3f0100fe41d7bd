"""The data of a run: examples that teach nothing are refused before the backbone loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prefixtune as pt
from prefixtune.cli.main import main
from prefixtune.errors import DataError


def test_data_without_a_target_is_refused_before_the_backbone_loads(
    train: Callable[..., Any], tmp_path: Path, no_backbone_loads: None, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = [pt.Example("a", ()), pt.Example("b", ())]
    with pytest.raises(DataError, match="the training data has 2 examples, and none has a target"):
        train(examples=bare)
    with pytest.raises(DataError, match="the development data has 2 examples, and none has a target"):
        train(dev_examples=bare)
    assert not (tmp_path / "run").exists()
    file = tmp_path / "bare.csv"
    file.write_text("mr,ref\nname[Aromi],\n")

    assert main(["train", "--task", "e2e", "--train", str(file), "--output", str(tmp_path / "run"), "--quiet"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
