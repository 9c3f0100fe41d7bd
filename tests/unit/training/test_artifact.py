"""The artifact of a run can be stored: known before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import prefixtune as pt
from prefixtune.errors import CheckpointError


def test_what_is_too_long_to_be_stored_is_refused_before_the_first_step(
    backbone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state has room for the configuration; the artifact's header has the labels, too."""
    monkeypatch.setattr("prefixtune.prefix.header._HEADER_BYTES", 30_000)
    examples = [pt.Example(f"n : {n}", (f"label {n} " + "a" * 90,), {"label": f"{n}"}) for n in range(300)]
    config = pt.TrainConfig(
        task="classification", classifier="words", prefix_length=2, init_text="ab", output=str(tmp_path / "run")
    )
    events: list[Any] = []
    with pytest.raises(CheckpointError, match=r"the header cannot be stored: it takes .* bytes"):
        pt.train(config, backbone=backbone, examples=examples, on_event=events.append)
    assert events == []
