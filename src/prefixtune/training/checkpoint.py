"""Files: the serving artifact (one small safetensors file) and the resumable training state.

What an artifact holds is told in `artifact`, which reads it; here it is written, and checked against a backbone. A
state holds the trained module, the optimizer and where the run stood. Both are written atomically; neither is ever a
pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import load_backbone
from prefixtune.data.encoding import TokenizedDataset, default_format
from prefixtune.errors import BackboneError, CheckpointError, ConfigError
from prefixtune.prefix.artifact import check_header, checked_metadata, read_checked, save_file
from prefixtune.prefix.fingerprint import fingerprints_match
from prefixtune.prefix.text_format import TextFormat, read_text_format
from prefixtune.training.baselines import Tuning, freeze_tuned, load_tuned_weights, tune
from prefixtune.training.config import TrainConfig
from prefixtune.utils.files import atomic_path

__all__ = [
    "LENGTHS",
    "Event",
    "events_until",
    "load_state",
    "load_tuned",
    "load_weights",
    "read_state",
    "save_state",
    "save_weights",
]


_STATE, _WEIGHTS = "prefixtune_state", "prefixtune_weights"


# --- the weights of other methods ------------------------------------------------------------------------------------


def save_weights(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Path:
    """Store what a method other than a prefix trained: tensors by the model's own names, and a header.

    Raises:
        CheckpointError: A tensor holds NaN or infinity.
        PrefixError: The file cannot be written.
    """
    path = Path(path)
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    broken = [name for name, tensor in kept.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise CheckpointError(f"{broken[0]!r} for {str(path)!r} holds NaN or infinity.", hint="train it again.")
    with atomic_path(path) as temporary:
        save_file(kept, temporary, checked_metadata(_WEIGHTS, header, kept))
    return path


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The reverse of `save_weights`.

    Raises:
        CheckpointError: The file is missing, truncated, damaged, something else or of an unknown version.
    """
    hint = "give the weights.safetensors that `prefixtune train --method full` (or another) wrote."
    tensors, header = read_checked(path, _WEIGHTS, "holds no weights of another method", hint)
    check_header(header, repr(str(path)))
    return tensors, header


# --- the training state ----------------------------------------------------------------------------------------------


def save_state(path: str | Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Store where a run stands, atomically.

    Args:
        path: The file.
        tensors: Parameters and optimizer moments by name.
        facts: Everything else, as JSON.

    Raises:
        PrefixError: The file cannot be written; the previous state is untouched.
    """
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(Path(path)) as temporary:
        save_file(kept, temporary, checked_metadata(_STATE, facts, kept))


def load_state(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The reverse of `save_state`.

    Raises:
        CheckpointError: The file is missing, truncated, damaged, no state, or of an unknown version.
    """
    hint = "resume a folder that `prefixtune train` made."
    return read_checked(path, _STATE, "is not a training state", hint)


Event = dict[str, Any]
"""What happened: `event` is start, resume, extend, step, evaluation, save or end; the rest are figures."""

PREFIX_FILE, STATE_FILE, EVENTS_FILE, CONFIG_FILE = (
    "prefix.safetensors",
    "state.safetensors",
    "events.jsonl",
    "config.toml",
)
WEIGHTS_FILE = "weights.safetensors"
"""The artifact of the methods that train the model's own weights."""
ADAPTER_FOLDER = "adapter"


LENGTHS = ("max_steps", "epochs", "patience")
"""How long a run goes on: a resumed run may be given more of it, and its schedule is then that of the new length."""
_MAY_CHANGE = ("output", "save_every", "device", "dtype", "shard", *LENGTHS)
"""What a resumed run may be told otherwise; the dtype in force is compared by itself."""


_STATE_FACTS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("step", "best_step", "misses"), (int,)),
    **dict.fromkeys(("fingerprint", "dtype", "data"), (str,)),
    "best_loss": (float, int, type(None)),
    "config": (dict,),
}
"""What a state tells of its run."""


def load_tuned(path: str | Path, **options: Any) -> tuple[Backbone, TextFormat]:
    """The backbone with the weights that another method than a prefix trained, and the text format of its training.

    Args:
        path: `weights.safetensors` of a run.
        **options: For `load_backbone`, such as `dtype`; `name_or_path` in place of the backbone that the header names.

    Raises:
        CheckpointError: The file is no such weights.
        BackboneError: The weights are another backbone's.
    """
    tensors, header = load_weights(path)
    origin = header["backbone"]
    backbone = load_backbone(options.pop("name_or_path", None) or origin["name"], **options)
    if not fingerprints_match(str(origin["fingerprint"]), backbone.fingerprint):
        raise BackboneError(
            f"{str(path)!r} was trained from {origin['name']!r} with other weights than {backbone.name!r}.",
            hint="load the backbone that its header names.",
        )
    backbone = tune(backbone, Tuning(header["method"], header["method_size"]))
    load_tuned_weights(backbone, tensors)
    return freeze_tuned(backbone), read_text_format(header) or default_format(backbone)


def read_state(config: TrainConfig) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of the run that a configuration goes on with.

    Raises:
        CheckpointError: There is no state, or it is broken.
        ConfigError: It belongs to another configuration.
    """
    path = Path(config.output) / STATE_FILE
    if not path.exists():
        raise CheckpointError(f"there is no run to resume in {str(path.parent)!r}.", hint="start it without --resume.")
    tensors, facts = load_state(path)
    faults = [name for name, kinds in _STATE_FACTS.items() if not isinstance(facts.get(name), kinds)]
    if faults:
        raise CheckpointError(
            f"{str(path)!r} lacks or spoils {', '.join(faults)}.", hint="start anew in another --output."
        )
    # What an older version did not know was as it is by default.
    stored, now = {**TrainConfig().to_dict(), **facts["config"]}, config.to_dict()
    changed = [k for k in now if stored.get(k) != now[k] and k not in _MAY_CHANGE]
    if changed:
        listed = ", ".join(f"{key} was {stored.get(key)!r}, is {now[key]!r}" for key in changed)
        raise ConfigError(
            f"the run in {str(path.parent)!r} was started otherwise: {listed}.",
            hint="resume with the same options, or start anew in another --output.",
        )
    if config.max_steps and stored["epochs"] != config.epochs:
        raise ConfigError(
            f"epochs is {config.epochs:g}, but the run in {str(path.parent)!r} is set by max_steps = "
            f"{config.max_steps}, which overrides it.",
            hint="give --max-steps N (max_steps=N) alone, or --max-steps 0, too.",
        )
    if 0 < config.max_steps < facts["step"]:
        raise ConfigError(
            f"max_steps is {config.max_steps}, but the run in {str(path.parent)!r} has taken {facts['step']} steps.",
            hint=f"give more, as in --max-steps {2 * facts['step']}.",
        )
    return tensors, {**facts, "config": stored}


def digest_dataset(*data: TokenizedDataset | None) -> str:
    """Tells encoded data apart."""
    total = hashlib.sha256()
    for encoding in data:
        for example in encoding.examples if encoding is not None else ():
            for ids in (example.prompt, *example.targets, ()):
                total.update(array("q", (len(ids), *ids)).tobytes())
        total.update(b"|")
    return total.hexdigest()


def finite_or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def events_until(path: Path, step: int) -> list[Event]:
    """The log's events up to a step; a last line that was cut off by a kill is left out.

    Raises:
        CheckpointError: Another line is damaged.
    """
    events: list[Event] = []
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror}.", hint="check its permissions.") from error
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
            # An unknown step would stay, too.
            kind, reached = event["event"], int(event.get("step", 0))
        except (ArithmeticError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if number == len(lines):
                break
            raise CheckpointError(
                f"line {number} of {str(path)!r} is no event of a training: {line[:40]!r}.",
                hint="delete the file: the run goes on from its state, and its log begins anew.",
            ) from error
        # An extension at this very step was stopped before it was saved, and is done anew.
        undone = kind in ("end", "resume") or (kind == "extend" and reached == step)
        if reached <= step and not undone:
            events.append(event)
    return events
