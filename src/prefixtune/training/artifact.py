"""What a run leaves: its prefix, or the weights that another method trained, as one file with a header."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefixtune import __version__
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.prefixes import make_header
from prefixtune.data.encoding import default_format
from prefixtune.errors import BackboneError, CheckpointError
from prefixtune.prefix.file import read_verified, save_verified
from prefixtune.prefix.fingerprint import fingerprints_match
from prefixtune.prefix.header import check_header
from prefixtune.prefix.hub import HUB
from prefixtune.prefix.prefix import Prefix, save_prefix
from prefixtune.prefix.text_format import TextFormat, read_text_format
from prefixtune.training.config import DEFAULT_SIZES, TrainConfig
from prefixtune.training.data import TrainData
from prefixtune.training.run_folder import PREFIX_FILE, WEIGHTS_FILE
from prefixtune.training.schedule import TrainState, finite_or_none, variation_facts
from prefixtune.training.tuning import freeze_tuned, load_tuned_weights, tune

_WEIGHTS = "prefixtune_weights"


def make_run_header(
    config: TrainConfig, backbone: Backbone, data: TrainData, initialization: Mapping[str, Any], state: TrainState
) -> dict[str, Any]:
    """The header of a run's artifact.

    Args:
        config: The run.
        backbone: What it was trained on.
        data: What it was trained with.
        initialization: Where it started, as `build_encoder` describes it.
        state: How far it is.
    """
    header = make_header(
        backbone,
        task=config.task,
        **({"form": config.form} if config.form else {}),
        method=config.method,
        text_format=data.text_format.to_dict(),
        **({} if data.labels is None else {"labels": data.labels.to_dict()}),
        initialization=initialization,
        **({"questions": [list(pair) for pair in data.questions]} if data.questions else {}),
        training={
            "steps": state.step,
            "total_steps": state.total_steps,
            "dev_loss": finite_or_none(state.best_loss),
            "num_targets": data.train.num_targets,
            **_hub_dataset(config.train),
            "backbone_dtype": backbone.dtype_name,
            **reparameterization_facts(config),
            "batch_size": config.batch_size,
            "loss_reduction": config.loss_reduction,
            "seed": config.seed,
            "learning_rate": config.peak_learning_rate,
            **variation_facts(config),
        },
        **({"adapter": config.adapter} if config.adapter else {}),
        license=config.license,
        made_with={"prefixtune": __version__, "torch": torch.__version__, "python": platform.python_version()},
    )
    if not config.trains_prefix:
        # Weights have no position.
        header.pop("rotation", None)
    return header


def _hub_dataset(train: str) -> dict[str, str]:
    """The data set of the hub that a run reads; a file on this machine is nobody else's.

    >>> _hub_dataset("hub:GEM/e2e_nlg@train"), _hub_dataset("places.jsonl")
    ({'dataset': 'GEM/e2e_nlg'}, {})
    """
    name = re.split("[:@#]", train.removeprefix(HUB))[0]
    return {"dataset": name} if train.startswith(HUB) and name else {}


def reparameterization_facts(config: TrainConfig) -> dict[str, Any]:
    """What a header says of how a prefix was computed while it trained: only what was used."""
    size = {"bottleneck_size": config.bottleneck_size} if config.reparameterization == "mlp" else {}
    return {"reparameterization": config.reparameterization, **size}


def save_artifact(config: TrainConfig, backbone: Backbone, prefix: Prefix | None, header: Mapping[str, Any]) -> None:
    """Store what a run has trained in its folder.

    Args:
        config: The run.
        backbone: What it was trained on; of another method, it holds the weights.
        prefix: As baked; None: the method trains the model's own weights.
        header: As `make_run_header` makes it.

    Raises:
        CheckpointError: A tensor holds NaN or infinity.
        PrefixError: A file cannot be written.
    """
    folder = Path(config.output)
    dtype = torch.float32 if config.save_dtype == "float32" else torch.bfloat16
    if prefix is not None:
        save_prefix(folder / PREFIX_FILE, Prefix(prefix.layers, header, prefix.head), dtype=dtype)
        return
    size = config.method_size or DEFAULT_SIZES[config.method]
    weights = {name: tensor.detach().to(dtype) for name, tensor in backbone.adapter_parameters.items()}
    save_weights(folder / WEIGHTS_FILE, weights, {**header, "method_size": size})


# --- the weights of other methods ------------------------------------------------------------------------------------


def save_weights(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Store what a method other than a prefix trained: tensors by the model's own names, and a header.

    Raises:
        CheckpointError: A tensor holds NaN or infinity.
        PrefixError: The file cannot be written.
    """
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise CheckpointError(f"{broken[0]!r} for {str(path)!r} holds NaN or infinity.", hint="train it again.")
    save_verified(path, tensors, _WEIGHTS, header)


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that `save_weights` wrote: its tensors and its header.

    Raises:
        CheckpointError: The file is missing, truncated, damaged, something else or of an unknown version.
    """
    hint = "give the weights.safetensors that `prefixtune train --method full` (or another) wrote."
    tensors, header = read_verified(path, _WEIGHTS, "holds no weights of another method", hint)
    check_header(header, repr(str(path)))
    return tensors, header


def load_tuned(path: str | Path, **options: Any) -> tuple[Backbone, TextFormat]:
    """The backbone with the weights that another method than a prefix trained, and the text format of its training.

    Args:
        path: `weights.safetensors` of a run.
        **options: For `load_backbone`, such as `dtype`; `name_or_path` in place of the backbone that the header names.

    Raises:
        CheckpointError: The file holds no such weights.
        BackboneError: The weights belong to another backbone.
    """
    tensors, header = load_weights(path)
    origin = header["backbone"]
    backbone = load_backbone(options.pop("name_or_path", None) or origin["name"], **options)
    if not fingerprints_match(str(origin["fingerprint"]), backbone.fingerprint):
        raise BackboneError(
            f"{str(path)!r} was trained from other weights.", hint="load the backbone that its header names."
        )
    backbone = tune(backbone, header["method"], header["method_size"])
    load_tuned_weights(backbone, tensors)
    return freeze_tuned(backbone), read_text_format(header) or default_format(backbone)
