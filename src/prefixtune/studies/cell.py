"""Cell."""

from __future__ import annotations

import dataclasses
import math
import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from prefixtune.backbone.load import choose_device, choose_dtype
from prefixtune.studies.config import StudyConfig
from prefixtune.studies.grid import Cell
from prefixtune.studies.records import CELL_FILE
from prefixtune.training.checkpoint import CONFIG_FILE
from prefixtune.training.config import TrainConfig


def describe_storage(cell: Cell, config: StudyConfig) -> str:
    """Whole layers are scored in the backbone's dtype; so they are stored in it, too."""
    half = choose_dtype(config.dtype, choose_device(config.device)) == torch.bfloat16
    return "bfloat16" if half and cell.method.partition(":")[0] in ("full", "top") else "float32"


def shorten_config(values: Mapping[str, Any], steps: int, num_targets: int) -> dict[str, Any]:
    """The settings of a try: no more than `steps`, warmed up over the same share of them, scored at the end."""
    usual: dict[str, Any] = {each.name: each.default for each in dataclasses.fields(TrainConfig)} | dict(values)
    batch = usual["batch_size"] * usual["gradient_accumulation"]
    whole = int(usual["max_steps"]) or math.ceil(usual["epochs"] * math.ceil(num_targets / batch))
    steps = max(min(steps, whole), 1)
    warmup = round(int(usual["warmup_steps"]) * steps / max(whole, 1))
    return {**values, "warmup_steps": warmup, "max_steps": steps, "eval_every": steps, "patience": 0}


def clear_folder(folder: Path) -> None:
    """Remove a run that is begun anew, but not what reports know its cell by."""
    for path in folder.iterdir() if folder.exists() else ():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != CELL_FILE:
            path.unlink(missing_ok=True)


def read_rate(folder: Path) -> float | None:
    """The learning rate of the training that is in a folder."""
    try:
        values = tomllib.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    rate = values.get("learning_rate")
    return float(rate) if isinstance(rate, int | float) else None
