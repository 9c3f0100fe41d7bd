"""The state that a stopped run resumes from: one file of tensors and JSON facts, without pickle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.devices import is_quantized
from prefixtune.errors import CheckpointError, ConfigError, first_line
from prefixtune.prefix.file import metadata_with_checksum, read_verified, save_file
from prefixtune.prefix.fingerprint import fingerprints_match
from prefixtune.training.config import TrainConfig
from prefixtune.training.folder import STATE_FILE
from prefixtune.utils.files import atomic_path

__all__ = [
    "Checkpoint",
    "TrainState",
    "check_same_run",
    "finite_or_none",
    "is_over",
    "load_state",
    "load_tensors",
    "read_checkpoint",
    "save_state",
    "state_facts",
    "state_tensors",
]


_STATE = "prefixtune_state"


@dataclass
class TrainState:
    """How far a run is.

    Attributes:
        total_steps: Optimizer steps that the configuration plans.
        step: Optimizer steps taken.
        best_loss: Lowest development loss per token; NaN before the first evaluation.
        best_step: The step that it was measured at.
        evals_without_improvement: Evaluations since then.
    """

    total_steps: int
    step: int = 0
    best_loss: float = math.nan
    best_step: int = 0
    evals_without_improvement: int = 0

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any], total_steps: int) -> TrainState:
        """The state that a checkpoint stores."""
        best_loss = math.nan if facts["best_loss"] is None else facts["best_loss"]
        return cls(total_steps, facts["step"], best_loss, facts["best_step"], facts["misses"])


@dataclass(frozen=True)
class Checkpoint:
    """A stored state.

    Attributes:
        folder: That of the run.
        tensors: As `state_tensors` collects them.
        facts: As `state_facts` makes them.
    """

    folder: str
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


_FACTS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("step", "best_step", "misses"), (int,)),
    **dict.fromkeys(("fingerprint", "dtype", "data"), (str,)),
    "quantized": (bool,),
    "best_loss": (float, int, type(None)),
    **dict.fromkeys(("config", "initialization"), (dict,)),
}

_REPORTING = ("report_to", "project", "run_name")
_MAY_CHANGE = ("backbone", "output", "save_every", "device", "dtype", "shard", *_REPORTING)
"""Options that may differ when a run is resumed; the weights and the dtype that result are compared by themselves."""


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
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(Path(path)) as temporary:
        save_file(stored, temporary, metadata_with_checksum(_STATE, facts, stored))


def load_state(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that `save_state` wrote: its tensors and its facts.

    Raises:
        CheckpointError: The file is missing, truncated, damaged, no state, or of an unknown version.
    """
    hint = "resume a folder that `prefixtune train` made."
    return read_verified(path, _STATE, "is not a training state", hint)


def state_facts(
    config: TrainConfig,
    backbone: Backbone,
    data_digest: str,
    state: TrainState,
    initialization: Mapping[str, Any],
) -> dict[str, Any]:
    """What a state stores beside the tensors."""
    return {
        "step": state.step,
        "best_loss": finite_or_none(state.best_loss),
        "best_step": state.best_step,
        "misses": state.evals_without_improvement,
        "fingerprint": backbone.fingerprint,
        "dtype": backbone.dtype_name,
        "quantized": is_quantized(backbone.model),
        "data": data_digest,
        "config": config.to_dict(),
        "initialization": dict(initialization),
    }


def state_tensors(
    encoder: nn.Module | None, adapter: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """What a state stores of the trained parameters and of the optimizer's moments, by name."""
    tensors: dict[str, Tensor] = {}
    if encoder is not None:
        tensors.update({f"module.{name}": tensor for name, tensor in encoder.state_dict().items()})
    tensors.update({f"adapter.{name}": parameter for name, parameter in adapter.items()})
    for index, values in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in values.items()})
    return tensors


def load_tensors(
    checkpoint: Checkpoint,
    encoder: nn.Module | None,
    adapter: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Put back what `state_tensors` collected.

    Raises:
        CheckpointError: The tensors are those of other parameters.
    """
    tensors = checkpoint.tensors
    try:
        if encoder is not None:
            own = {name.removeprefix("module."): t for name, t in tensors.items() if name.startswith("module.")}
            encoder.load_state_dict(own)
        with torch.no_grad():
            for name, parameter in adapter.items():
                parameter.copy_(tensors[f"adapter.{name}"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                moments.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    except (RuntimeError, LookupError, ValueError) as error:
        raise CheckpointError(
            f"the state in {checkpoint.folder!r} does not fit the run: {first_line(error)}",
            hint="start again in another --output.",
        ) from error


# --- resuming --------------------------------------------------------------------------------------------------------


def read_checkpoint(config: TrainConfig) -> Checkpoint:
    """The state of the run that a configuration resumes.

    Raises:
        CheckpointError: There is no state, or it is broken.
        ConfigError: It belongs to another configuration.
    """
    path = Path(config.output) / STATE_FILE
    if not path.exists():
        raise CheckpointError(f"there is no run to resume in {str(path.parent)!r}.", hint="start it without --resume.")
    tensors, facts = load_state(path)
    faults = [name for name, kinds in _FACTS.items() if not isinstance(facts.get(name), kinds)]
    if faults:
        raise CheckpointError(
            f"{str(path)!r} lacks {', '.join(faults)}, or has a wrong value there.",
            hint="start again in another --output.",
        )
    stored, given = facts["config"], config.to_dict()
    changed = [
        f"{name} was {stored.get(name)!r}, is {given.get(name)!r}"
        for name in sorted((stored.keys() | given.keys()) - set(_MAY_CHANGE))
        if stored.get(name) != given.get(name)
    ]
    if changed:
        raise ConfigError(
            f"the run in {config.output!r} was started with other options: {', '.join(changed)}.",
            hint="resume with the same options, or start from its prefix in another --output (--init-prefix).",
        )
    return Checkpoint(str(path.parent), tensors, facts)


def is_over(config: TrainConfig, state: TrainState) -> bool:
    """Whether all steps of a run are taken, or its patience is used up."""
    return state.step >= state.total_steps or 0 < config.patience <= state.evals_without_improvement


def check_same_run(checkpoint: Checkpoint, backbone: Backbone, data_digest: str) -> None:
    """Refuse a state of another backbone or of other data.

    Raises:
        ConfigError: The state belongs to another run.
    """
    facts = checkpoint.facts
    differs = {
        f"the backbone {backbone.name!r}": not fingerprints_match(facts["fingerprint"], backbone.fingerprint),
        f"the dtype {backbone.dtype_name}": facts["dtype"] != backbone.dtype_name,
        "quantize": facts["quantized"] is not is_quantized(backbone.model),
        "data, or prefixes beside it": facts["data"] != data_digest,
    }
    if others := [name for name, is_so in differs.items() if is_so]:
        raise ConfigError(
            f"the run in {checkpoint.folder!r} was started with another backbone, dtype or data: not with "
            f"{'; '.join(others)}.",
            hint="give it what it was started with, or start again in another --output.",
        )


def finite_or_none(value: float) -> float | None:
    """The value, with None for NaN, which JSON does not have."""
    return None if math.isnan(value) else value
