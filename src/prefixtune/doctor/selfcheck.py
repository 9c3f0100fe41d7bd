"""The check of a model that is loaded: the doctor's comparisons, once for each type of model.

A pass is remembered in the cache folder, by everything but the weights that it depends on, and by whether it was made
in float32. `PREFIXTUNE_SELF_CHECK=0` turns the check off.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

from prefixtune.attention.layout import Layout, main_device
from prefixtune.doctor.examine import computes_exactly, examine
from prefixtune.errors import BackboneError, PrefixError
from prefixtune.utils.files import write_text
from prefixtune.utils.folders import cache_folder

SWITCH = "PREFIXTUNE_SELF_CHECK"
"""The environment variable that turns the check off where it is 0."""


def check_once(model: Any, layout: Layout, attention: str) -> None:
    """Check a model of a type that was not checked before, unless that is turned off; remember that it passed.

    Args:
        model: The frozen model, probed before.
        layout: What `probe` found.
        attention: What computes the attention.

    Raises:
        BackboneError: Prefixes do not work on it; the message says what differs.
    """
    if os.environ.get(SWITCH) == "0":
        return
    facts = _facts(model, attention)
    if _note(facts).is_file():
        return
    if failed := [str(found) for found in examine(model, layout) if not found.passed]:
        raise BackboneError(
            f"{facts['model_class']} (model type {facts['model_type']!r}) does not carry prefixes correctly: "
            f"{'; '.join(failed)}.",
            hint=f"choose another backbone; `prefixtune doctor` shows all comparisons, and {SWITCH}=0 loads it anyway.",
        )
    # Where the folder cannot be written, the check runs each time.
    with contextlib.suppress(PrefixError, OSError):
        write_text(_note(facts), json.dumps(facts, indent=1) + "\n")


def _note(facts: dict[str, str]) -> Path:
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "checked" / f"{name}.json"


def _facts(model: Any, attention: str) -> dict[str, str]:
    """Everything but the weights that a model's behaviour with prefixes depends on."""
    config = model.config.to_dict()
    for name in ("_name_or_path", "name_or_path", "transformers_version", "architectures", "dtype"):
        config.pop(name, None)
    return {
        "model_type": str(getattr(model.config, "model_type", "?")),
        "model_class": type(model).__name__,
        "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        "attention": attention,
        "device": main_device(model).type,
        "in_float32": str(computes_exactly(model, main_device(model))),
        **{name: importlib.metadata.version(name) for name in ("transformers", "torch", "prefixtune")},
    }
