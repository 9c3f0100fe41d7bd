"""The check of a model that is loaded: the doctor's comparisons, once for each type of model.

A pass is remembered in the cache folder, by everything but the weights that it depends on, and by whether it was made
in float32. `PREFIXTUNE_SELF_CHECK=0` turns the check off. What was seen of a checkpoint is kept too,
by its files.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefixtune.attention.layout import Layout, main_device
from prefixtune.attention.registry import register
from prefixtune.doctor.examine import computes_exactly, examine
from prefixtune.errors import BackboneError, PrefixError
from prefixtune.prefix.geometry import LayerShape
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


def weight_files(path: Path) -> str:
    """Every file of weights in a folder, or one file, with size, inode and the times of the last changes."""
    with contextlib.suppress(OSError):
        files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
        stats = [(str(file.absolute()), file.stat()) for file in files]
        return json.dumps([(name, s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats])
    return ""


class Seen:
    """What was found in a model by running it, kept for the next load of the same files; without files, nowhere."""

    def __init__(self, model: Any, attention: str, files: str) -> None:
        """Describe a model before it is probed; `files` are `weight_files`, listed before they were read."""
        facts = {**_facts(model, attention), "dtype": str(model.dtype), "files": files} if files else {}
        self._model, self._path = model, _note(facts, "seen") if facts else None

    def recall(self) -> tuple[Layout, str] | None:
        """The layout and the fingerprint, with the attention chosen as by `probe`; None: they are to be found."""
        # A note that is missing or damaged is none.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            note = json.loads(self._path.read_text(encoding="utf-8")) if self._path else {}
            layout: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in note["layout"].items()
            }
            layout["geometry"] = {site: tuple(LayerShape(**one) for one in g) for site, g in layout["geometry"].items()}
            layout["layer_of"] = {self._model.get_submodule(name): tuple(at) for name, at in layout["layer_of"].items()}
            register()
            self._model.set_attn_implementation(note["attention"])
            return Layout(**layout), str(note["fingerprint"])
        return None

    def remember(self, layout: Layout, fingerprint: str) -> None:
        """Keep what was found; where the folder cannot be written, it is found each time."""
        if self._path is not None:
            names = {module: name for name, module in self._model.named_modules()}
            plain = {**vars(layout), "layer_of": {names[module]: at for module, at in layout.layer_of.items()}}
            note = {"layout": plain, "attention": self._model.config._attn_implementation, "fingerprint": fingerprint}
            with contextlib.suppress(PrefixError, OSError):
                write_text(self._path, json.dumps(note, default=asdict) + "\n")


def _note(facts: dict[str, str], folder: str = "checked") -> Path:
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return cache_folder() / folder / f"{name}.json"


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
