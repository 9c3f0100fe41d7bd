"""The state that a stopped run resumes from: one file of tensors and JSON facts, without pickle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.devices import is_quantized
from prefixtune.errors import CheckpointError, ConfigError, first_line
from prefixtune.prefix.file import read_verified, save_verified
from prefixtune.prefix.fingerprint import fingerprints_match
from prefixtune.training.config import TrainConfig
from prefixtune.training.run_folder import EARLIER_STATE_FILE, STATE_FILE
from prefixtune.training.schedule import TrainState

_STATE = "prefixtune_state"
_OTHERWISE = "start again in another --output."
_REPORTING = ("report_to", "project", "run_name")
_MAY_CHANGE = ("backbone", "output", "save_every", "device", "dtype", "shard", *_REPORTING)
"""Options that may differ when a run is resumed; the weights and the dtype that result are compared by themselves."""


class Facts(BaseModel):
    """What a state stores beside the tensors."""

    model_config = ConfigDict(strict=True, extra="allow")

    step: int
    best_loss: float | None
    best_step: int
    misses: int
    fingerprint: str
    dtype: str
    quantized: bool
    data: str
    config: dict[str, Any]
    initialization: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A stored state: its file, the tensors as `state_tensors` collects them, and the facts."""

    path: Path
    tensors: Mapping[str, Tensor]
    facts: Facts

    def state(self, planned: TrainState) -> TrainState:
        """How far the run was that is planned so."""
        facts = self.facts
        best_loss = math.nan if facts.best_loss is None else facts.best_loss
        return replace(planned, step=facts.step, best_loss=best_loss, best_step=facts.best_step, misses=facts.misses)

    def is_over_by(self, step: int, planned: TrainState) -> bool:
        """Whether the run that is planned so was over before a step."""
        return self.facts.step < step and self.state(planned).is_over


# --- the state's file ------------------------------------------------------------------------------------------------


def save_state(path: str | Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Store a state, atomically.

    Args:
        path: The file.
        tensors: Parameters and optimizer moments by name.
        facts: Everything else, as JSON.

    Raises:
        PrefixError: The file cannot be written; the previous state is untouched.
    """
    save_verified(path, tensors, _STATE, facts)


def load_state(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that `save_state` wrote: its tensors and its facts.

    Raises:
        CheckpointError: The file is missing, truncated, damaged, no state, or of an unknown version.
    """
    return read_verified(path, _STATE, "is not a training state", "resume a folder that `prefixtune train` made.")


def state_tensors(trained: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What a state stores: what trains, by name, and the optimizer's moments."""
    tensors = dict(trained)
    for index, values in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in values.items()})
    return tensors


def load_tensors(checkpoint: Checkpoint, trained: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Put back what `state_tensors` collected.

    Raises:
        CheckpointError: The tensors are those of other parameters.
    """
    try:
        with torch.no_grad():
            for name, tensor in trained.items():
                tensor.copy_(checkpoint.tensors[name])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in checkpoint.tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                moments.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    except (RuntimeError, LookupError, ValueError) as error:
        raise CheckpointError(
            f"the state in {str(checkpoint.path.parent)!r} does not fit the run: {first_line(error)}", hint=_OTHERWISE
        ) from error


# --- resuming --------------------------------------------------------------------------------------------------------


def read_checkpoints(config: TrainConfig) -> list[Checkpoint]:
    """The states of the run that a configuration resumes, the last one first.

    Raises:
        CheckpointError: A state is broken.
        ConfigError: It belongs to another configuration.
    """
    paths = [Path(config.output) / name for name in (STATE_FILE, EARLIER_STATE_FILE)]
    return [_read_checkpoint(config, path) for path in paths if path.exists()]


def _read_checkpoint(config: TrainConfig, path: Path) -> Checkpoint:
    tensors, values = load_state(path)
    try:
        facts = Facts.model_validate(values)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise CheckpointError(f"{str(path)!r} lacks {where}, or has a wrong value there.", hint=_OTHERWISE) from error
    stored, given = (_without_folder(values) for values in (facts.config, config.to_dict()))
    changed = [
        f"{name} was {stored.get(name)!r}, is {given.get(name)!r}"
        for name in sorted((stored.keys() | given.keys()) - set(_MAY_CHANGE))
        if stored.get(name) != given.get(name)
    ]
    if changed:
        what = f"the run in {config.output!r} was started with other options: {', '.join(changed)}."
        raise ConfigError(what, hint="resume with the same, or give --init-prefix and another --output.")
    return Checkpoint(path, tensors, facts)


def _without_folder(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration whose text to start from, if it lies in the run's folder, is named within it."""
    return {**values, "init_text": str(values.get("init_text")).removeprefix(f"@{values.get('output')}/")}


def check_same_run(checkpoint: Checkpoint, backbone: Backbone, data_digest: str) -> None:
    """Refuse a state of another backbone or of other data.

    Raises:
        ConfigError: The state belongs to another run.
    """
    facts = checkpoint.facts
    differs = {
        f"the backbone {backbone.name!r}": not fingerprints_match(facts.fingerprint, backbone.fingerprint),
        f"the dtype {backbone.dtype_name}": facts.dtype != backbone.dtype_name,
        "quantize": facts.quantized is not is_quantized(backbone.model),
        "data, or prefixes beside it": facts.data != data_digest,
    }
    if others := [name for name, is_so in differs.items() if is_so]:
        raise ConfigError(
            f"the run in {str(checkpoint.path.parent)!r} was started with another backbone, dtype or data: not with "
            f"{'; '.join(others)}.",
            hint="give it those, or start again in another --output.",
        )
