"""LoRA adapters on a backbone, by PEFT, which is imported when an adapter is used."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from prefixtune.backbone.quiet import quiet_transformers
from prefixtune.errors import BackboneError, CheckpointError, first_line
from prefixtune.prefix.header import parse_header
from prefixtune.utils.extras import needs_extra

ADAPTER_CONFIG = "adapter_config.json"
"""The file in which PEFT describes an adapter."""


def import_peft() -> Any:
    """PEFT, which imports torchao where it is installed; what that says of the machine is no matter here.

    Raises:
        ConfigError: It is not installed.
    """
    with needs_extra("lora", "a LoRA adapter"), quiet_transformers():
        import peft
    return peft


def load_adapter(model: Any, path: str) -> None:
    """Put a LoRA adapter of PEFT into a model; its files were checked by `check_adapter`.

    Raises:
        BackboneError: It lacks weights, or does not fit.
    """
    peft = import_peft()
    try:
        tuned = peft.PeftModel.from_pretrained(model, path, local_files_only=True)
        # PEFT only warns of weights that are missing, and leaves those layers as they were.
        stored = peft.load_peft_weights(path, device="cpu").keys()
        missing = sorted(key for key in peft.get_peft_model_state_dict(tuned) if "lora_" in key and key not in stored)
    except (ValueError, RuntimeError, KeyError, OSError, TypeError) as error:
        what = f"the adapter {path!r} does not fit: {first_line(error)}"
        raise BackboneError(what, hint="load its own base model.") from error
    if missing:
        what = f"the adapter {path!r} lacks {len(missing)} weights that its configuration asks for: {missing[0]}, ..."
        raise BackboneError(what, hint="get the whole adapter, and load its own base model.")


def add_adapter(model: Any, rank: int, *, seed: int = 0) -> None:
    """Put a fresh LoRA adapter on every linear layer but the output head, to be trained; it starts without effect."""
    peft = import_peft()
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft.get_peft_model(model, config)


def has_adapter(model: torch.nn.Module) -> bool:
    """Whether a model holds the layers of a LoRA adapter."""
    return any(hasattr(module, "lora_A") for module in model.modules())


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and not a whole model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def adapter_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What PEFT wrote of an adapter.

    Raises:
        CheckpointError: There is no such file in the folder, or it is no JSON object.
    """
    path = Path(folder) / ADAPTER_CONFIG
    hint = "give the folder that PEFT's save_pretrained wrote."
    if not path.is_file():
        raise CheckpointError(f"{str(folder)!r} holds no {ADAPTER_CONFIG}.", hint=hint)
    try:
        return parse_header(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error}.", hint=hint) from error


def base_model_name(folder: Path) -> str:
    """The model that an adapter was trained on, by its configuration.

    Raises:
        BackboneError: It names none, or is no LoRA adapter.
        CheckpointError: Its configuration cannot be read.
    """
    base = _lora_config(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        hint = "load that model yourself, with adapter=FOLDER (--adapter FOLDER)."
        raise BackboneError(f"the adapter {str(folder)!r} names no base model.", hint=hint)
    return base


def check_adapter(folder: Path) -> None:
    """Refuse what is no LoRA adapter in safetensors; a pickle could run code.

    Raises:
        BackboneError: It is not.
        CheckpointError: Its configuration cannot be read.
    """
    _lora_config(folder)
    if not (folder / "adapter_model.safetensors").is_file():
        hint = "give the folder that PEFT's save_pretrained wrote, with safe serialization."
        raise BackboneError(f"{str(folder)!r} holds no adapter_model.safetensors.", hint=hint)


def _lora_config(folder: Path) -> dict[str, Any]:
    """An adapter's configuration; PEFT's other adapters, in front of the text, would be ignored in silence."""
    config = adapter_config(folder)
    if (kind := config.get("peft_type")) != "LORA":
        hint = "only LORA adapters are part of a backbone."
        if kind in ("PREFIX_TUNING", "CARTRIDGE"):
            hint = "it is a prefix: `prefixtune convert FOLDER prefix.safetensors --to prefixtune`."
        raise BackboneError(f"the adapter {str(folder)!r} is of type {kind!r}, not LORA.", hint=hint)
    return config
