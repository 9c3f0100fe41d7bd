"""The pages that are made from the code say what a reader looks for; one that is kept is current."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from prefixtune.cli.main import command_options
from prefixtune.training.config import TrainConfig
from tools.site import reference


@pytest.mark.parametrize("page", ["gpu_page", "gallery"])
def test_the_page_is_current(page):
    subprocess.run(
        [sys.executable, "-m", f"tools.{page}", "--check"], cwd=Path(__file__).resolve().parents[3], check=True
    )


def test_every_command_field_and_endpoint_has_its_place(tmp_path):
    reference.write(tmp_path)
    commands = (tmp_path / "cli.md").read_text(encoding="utf-8")
    for name in command_options():
        assert f"\n## prefixtune {name}\n" in commands
    train = (tmp_path / "configuration.md").read_text(encoding="utf-8").split("\n## ")[1]
    for name in TrainConfig.model_fields:
        assert f"\n| `{name}` | " in train
    assert '\n| `on_too_long` | `"cut"`, `"error"` | `"cut"` | ' in train
    page = (tmp_path / "http.md").read_text(encoding="utf-8")
    for heading in ("GET /v1/models", "POST /v1/chat/completions", "PUT /v1/models/{name}", "CompletionRequest"):
        assert f"\n### {heading}\n" in page
