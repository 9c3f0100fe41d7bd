"""Generated pages are current, and say what a reader looks for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from prefixtune.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("tool", ["config_page", "http_page", "gpu_page"])
def test_the_page_is_current(tool: str) -> None:
    command = [sys.executable, "-m", f"tools.{tool}", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_field_has_its_row() -> None:
    train = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8").split("\n## ")[1]
    for name in TrainConfig.model_fields:
        assert f"\n| `{name}` | " in train
    assert '\n| `on_too_long` | `"cut"`, `"error"` | `"cut"` | ' in train
    assert "\n| `hold_out` | number at least 0 and below 1 | `0.0` | " in train


def test_every_endpoint_has_its_section() -> None:
    page = (ROOT / "docs" / "http.md").read_text(encoding="utf-8")
    for heading in ("GET /v1/models", "POST /v1/chat/completions", "PUT /v1/models/{name}", "CompletionRequest"):
        assert f"\n### {heading}\n" in page
