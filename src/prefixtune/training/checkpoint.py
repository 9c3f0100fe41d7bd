"""The state that a stopped run resumes from: one file of tensors and JSON facts, without pickle."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.quantization import is_quantized
from prefixtune.errors import CheckpointError, ConfigError, first_line
from prefixtune.prefix.fingerprint import fingerprints_match
from prefixtune.prefix.tensor_file import metadata_with_checksum, read_verified, save_file
from prefixtune.training.config import TrainConfig
from prefixtune.training.folder import PREVIOUS_FILE, STATE_FILE
from prefixtune.utils.files import atomic_path

__all__ = [
    "Checkpoint",
    "TrainState",
    "check_extension",
    "check_same_run",
    "finite_or_none",
    "goes_on_differently",
    "is_over",
    "keep_state",
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
    "best_loss": (float, int, type(None)),
    "config": (dict,),
    # Older states do not have it.
    "initialization": (dict, type(None)),
}

_LENGTHS = ("max_steps", "epochs", "patience")
"""How long a run goes on: a resumed run may be given more of it, and its schedule is then that of the new length."""
_REPORTING = ("report_to", "project", "run_name", "report_examples")
_MAY_CHANGE = ("backbone", "output", "save_every", "device", "dtype", "shard", "data_cache", *_REPORTING, *_LENGTHS)
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


def keep_state(folder: Path) -> None:
    """Keep a copy of a run's state, where it has one, beside the one that is about to be stored."""
    path = folder / STATE_FILE
    if path.exists():
        with atomic_path(folder / PREVIOUS_FILE) as temporary:
            shutil.copyfile(path, temporary)


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
    initialization: Mapping[str, Any] | None = None,
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
        "initialization": None if initialization is None else dict(initialization),
    }


def state_tensors(
    encoder: nn.Module | None, adapter: Mapping[str, Tensor], optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """What a state stores of the trained parameters and of the optimizers' moments, by name."""
    tensors: dict[str, Tensor] = {}
    if encoder is not None:
        tensors.update({f"module.{name}": tensor for name, tensor in encoder.state_dict().items()})
    tensors.update({f"adapter.{name}": parameter for name, parameter in adapter.items()})
    for optimizer, indices in _indices(optimizers):
        for own, values in optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer.{indices[own]}.{key}": torch.as_tensor(v) for key, v in values.items()})
    return tensors


def _indices(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[tuple[torch.optim.Optimizer, range]]:
    """Each optimizer with the indices of its parameters, counted through all optimizers."""
    first = 0
    for optimizer in optimizers:
        end = first + sum(len(group["params"]) for group in optimizer.param_groups)
        yield optimizer, range(first, end)
        first = end


def load_tensors(
    checkpoint: Checkpoint,
    encoder: nn.Module | None,
    adapter: Mapping[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
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
        for optimizer, indices in _indices(optimizers):
            state = {own: moments[index] for own, index in enumerate(indices) if index in moments}
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    except (RuntimeError, LookupError, ValueError) as error:
        raise CheckpointError(
            f"the state in {checkpoint.folder!r} does not fit the run: {first_line(error)}",
            hint="start again in another --output.",
        ) from error


# --- resuming --------------------------------------------------------------------------------------------------------


def read_checkpoint(config: TrainConfig, name: str = STATE_FILE) -> Checkpoint:
    """The state of the run that a configuration resumes, from a file of its folder.

    Raises:
        CheckpointError: There is no state, or it is broken.
        ConfigError: It belongs to another configuration.
    """
    path = Path(config.output) / name
    if not path.exists():
        raise CheckpointError(f"there is no run to resume in {str(path.parent)!r}.", hint="start it without --resume.")
    tensors, facts = load_state(path)
    faults = [name for name, kinds in _FACTS.items() if not isinstance(facts.get(name), kinds)]
    if faults:
        raise CheckpointError(
            f"{str(path)!r} lacks {', '.join(faults)}, or has a wrong value there.",
            hint="start again in another --output.",
        )
    # An option that an older version did not have was at its default.
    stored = {**TrainConfig().to_dict(), **facts["config"]}
    _check_same_config(config, stored, facts["step"])
    return Checkpoint(str(path.parent), tensors, {"initialization": None, **facts, "config": stored})


def _check_same_config(config: TrainConfig, stored: Mapping[str, Any], step: int) -> None:
    """Refuse options that a resumed run cannot change.

    Raises:
        ConfigError: One has changed, or the new length contradicts the run so far.
    """
    changed = [
        f"{name} was {stored.get(name)!r}, is {value!r}"
        for name, value in config.to_dict().items()
        if stored.get(name) != value
        and name not in _MAY_CHANGE
        # A run from a prefix has that prefix's length, which older versions wanted to be given.
        and not (name == "prefix_length" and not value and config.initialization == "prefix")
    ]
    if changed:
        raise ConfigError(
            f"the run in {config.output!r} was started with other options: {', '.join(changed)}.",
            hint="resume with the same options, or start again in another --output.",
        )
    if config.max_steps and stored["epochs"] != config.epochs:
        raise ConfigError(
            f"epochs is {config.epochs:g}, but the length of the run in {config.output!r} is max_steps = "
            f"{config.max_steps}, which overrides it.",
            hint="give --max-steps N (max_steps=N) alone, or --max-steps 0, too.",
        )
    if 0 < config.max_steps < step:
        raise ConfigError(
            f"max_steps is {config.max_steps}, but the run in {config.output!r} has taken {step} steps.",
            hint=f"give more, as in --max-steps {2 * step}.",
        )


def is_over(config: TrainConfig, state: TrainState) -> bool:
    """Whether all steps of a run are taken, or its patience is used up."""
    return state.step >= state.total_steps or 0 < config.patience <= state.evals_without_improvement


def check_same_run(checkpoint: Checkpoint, backbone: Backbone, data_digest: str) -> None:
    """Refuse a state of another backbone or of other data.

    Raises:
        ConfigError: The state belongs to another run.
    """
    folder, facts = checkpoint.folder, checkpoint.facts
    if not fingerprints_match(facts["fingerprint"], backbone.fingerprint):
        stored = facts["config"]["backbone"]
        other = f"{stored!r}, not {backbone.name!r}" if stored != backbone.name else f"{stored!r} with other weights"
        hint = "load that one, and give it with --backbone (backbone=...)."
        if facts["config"].get("adapter_rank") and facts["config"].get("seed"):
            hint += (
                " A new adapter now begins by the run's seed, not by 0: a run that an earlier version began with one "
                "cannot go on; start again in another --output."
            )
        raise ConfigError(f"the run in {folder!r} was started on another backbone: {other}.", hint=hint)
    dtype = backbone.dtype_name
    if facts["dtype"] != dtype:
        raise ConfigError(
            f"the run in {folder!r} was started in {facts['dtype']}, but the backbone is in {dtype}.",
            hint=f"resume with --dtype {facts['dtype']}.",
        )
    quantized = is_quantized(backbone.model)
    if facts.get("quantized", quantized) is not quantized:
        change = "was quantized, but not now" if facts["quantized"] else "was not quantized, but now it is"
        raise ConfigError(
            f"the backbone of the run in {folder!r} {change}.",
            hint="give it as it was: --quantize (quantize=...), or the loaded backbone.",
        )
    before, now = (digest.partition("+") for digest in (facts["data"], data_digest))
    if before[0] == now[0] and before[2] != now[2]:
        raise ConfigError(
            f"the run in {folder!r} was started with other prefixes beside it.",
            hint="give the same runs in the same order, or the same files in the folder of --beside, or start again in "
            "another --output.",
        )
    if facts["data"] != data_digest:
        raise ConfigError(
            f"the run in {folder!r} was started on other data.",
            hint="give it the same files, or start again in another --output.",
        )


def goes_on_differently(config: TrainConfig, checkpoint: Checkpoint) -> bool:
    """Whether a resumed run is given another length, or reports elsewhere, than it was started with."""
    stored, given = {**TrainConfig().to_dict(), **checkpoint.facts["config"]}, config.to_dict()
    return any(stored[name] != given[name] for name in (*_LENGTHS, *_REPORTING))


def check_extension(config: TrainConfig, state: TrainState, planned_steps: int) -> None:
    """Refuse a new length at which the run could not go on.

    Args:
        config: The run, with its new length.
        state: How far the run is; its total is that of the new length.
        planned_steps: The total of the old length.

    Raises:
        ConfigError: The steps are taken already, or the run has stopped early.
    """
    if state.total_steps != planned_steps and state.total_steps <= state.step:
        raise ConfigError(
            f"the new length is {state.total_steps} steps, but the run in {config.output!r} has taken {state.step}.",
            hint=f"give more, as in --max-steps {2 * state.step}.",
        )
    waited = state.evals_without_improvement
    if state.total_steps > planned_steps and 0 < config.patience <= waited:
        raise ConfigError(
            f"the run in {config.output!r} stopped at step {state.step}, as {waited} evaluations brought no "
            "better loss; more steps alone do not make it go on.",
            hint=f"give more patience, too, as in --patience {2 * waited}, or 0 for any number.",
        )


def finite_or_none(value: float) -> float | None:
    """The value, with None for NaN, which JSON does not have."""
    return None if math.isnan(value) else value
