"""Files: the serving artifact (one small safetensors file) and the resumable training state.

What an artifact holds is told in `artifact`, which reads it; here it is written, and checked against a backbone. A
state holds the trained module, the optimizer and where the run stood. Both are written atomically; neither is ever a
pickle.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefixtune.artifact import (
    HEADER_KEY,
    check_header,
    checked_metadata,
    describe_tensors,
    read_artifact,
    read_checked,
    save_file,
)
from prefixtune.attach import check_fits
from prefixtune.backbone import DTYPES, Backbone, BackboneLike, as_backbone
from prefixtune.errors import BackboneError, CheckpointError, ConfigError, describe_value, did_you_mean
from prefixtune.files import atomic_path
from prefixtune.fingerprints import fingerprints_match
from prefixtune.hub import FILE, download, is_repository, repository_of
from prefixtune.prefix import Prefix

__all__ = [
    "PrefixLike",
    "as_prefix",
    "load_prefix",
    "load_state",
    "load_weights",
    "make_header",
    "prefix_file",
    "save_prefix",
    "save_state",
    "save_weights",
]

_STATE, _WEIGHTS = "prefixtune_state", "prefixtune_weights"


def make_header(backbone: Backbone, **facts: Any) -> dict[str, Any]:
    """What an artifact says of its origin; `save_prefix` adds what it says of its tensors.

    Args:
        backbone: The model that it was trained for.
        **facts: More, such as `task`, `text_format`, `training`, `initialization`, `license`.
    """
    origin = {"name": backbone.name, "fingerprint": backbone.fingerprint, "kind": backbone.kind}
    return {"backbone": origin, **facts}


def save_prefix(path: str | os.PathLike[str], prefix: Prefix, *, dtype: torch.dtype | str = torch.float32) -> Path:
    """Store a prefix as one file: the tensors and its header.

    Args:
        path: Ends with `.safetensors`.
        prefix: With its header; see `make_header`.
        dtype: float32, or bfloat16 for half the size; or its name.

    Raises:
        CheckpointError: The prefix holds NaN or infinity, or the path has another ending.
        ConfigError: An argument is something else.
        PrefixError: The file cannot be written.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(prefix, Prefix):
        raise ConfigError(
            f"path is {describe_value(path)} and prefix {describe_value(prefix)}, but must be a path and a Prefix.",
            hint="write save_prefix(path, prefix).",
        )
    if not isinstance(dtype, torch.dtype):
        if dtype not in DTYPES:
            raise ConfigError(f"unknown dtype {dtype!r}.", hint=did_you_mean(str(dtype), DTYPES))
        dtype = DTYPES[dtype]
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{str(path)!r} does not end with .safetensors.", hint=f"write to {path.stem}.safetensors."
        )
    stored = prefix.detach().to(dtype, "cpu")
    if not stored.is_finite():
        raise CheckpointError(f"the prefix for {str(path)!r} holds NaN or infinity.", hint="train it again.")
    header = {**prefix.header, **describe_tensors(stored)}
    check_header(header, f"the prefix for {str(path)!r}")
    tensors = {
        f"{site}.{number}.{part}": tensor.contiguous()
        for site, layers in stored.layers.items()
        for number, pair in enumerate(layers)
        for part, tensor in zip(("key", "value"), pair, strict=True)
    }
    if stored.head is not None:
        tensors |= {"head.weight": stored.head.weight.contiguous(), "head.bias": stored.head.bias.contiguous()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, checked_metadata(HEADER_KEY, header, tensors))
    return path


PrefixLike = Prefix | str | os.PathLike[str]
"""What stands for a prefix: itself, a path, or `hub:OWNER/NAME`."""


def as_prefix(given: PrefixLike | None, backbone: Backbone | None = None) -> Prefix | None:
    """The prefix that a caller means.

    Args:
        given: A `Prefix`, None, or what `load_prefix` takes; that is read, and checked against the backbone.
        backbone: What it stands in front of.

    Raises:
        BackboneError: It was trained for another model.
        CheckpointError: The file is missing or wrong.
        ConfigError: It is nothing of these.
        PrefixError: The hub cannot be reached.
    """
    if given is None or isinstance(given, Prefix):
        return given
    return load_prefix(given, backbone)


def load_prefix(
    path: PrefixLike, backbone: BackboneLike | None = None, *, allow_other_backbone: bool = False
) -> Prefix:
    """Read an artifact, checking all of it before any of it is used.

    Args:
        path: The file; the folder of a run, which holds one; or `hub:OWNER/NAME`, a repository of the hub, which is
            downloaded. A `Prefix` is checked and given back.
        backbone: Also check that the prefix was trained for this model.
        allow_other_backbone: Accept another fingerprint, when the shapes fit (a fine-tuned sister, say).

    Raises:
        CheckpointError: The file is missing, truncated, damaged, no prefix, of an unknown version, or holds NaN or
            infinity; its header and its tensors disagree.
        BackboneError: Its shapes are not the backbone's, or it was trained for other weights.
        ConfigError: `path` or `backbone` is something else.
        PrefixError: The hub cannot be reached, or has no such file.
    """
    prefix = path if isinstance(path, Prefix) else read_artifact(prefix_file(path))
    path = "the prefix" if isinstance(path, Prefix) else path
    if backbone is not None:
        backbone = as_backbone(backbone)
        check_fits(prefix, backbone.geometry, backbone.name)
        head = prefix.head
        if head is not None and head.weight.shape[1] != backbone.hidden_size:
            raise BackboneError(
                f"the head in {str(path)!r} is for hidden states of {head.weight.shape[1]}, but {backbone.name!r} has "
                f"{backbone.hidden_size}.",
                hint="load the backbone that its header names.",
            )
        _check_fingerprint(prefix.header, backbone, path, allow_other_backbone)
    return prefix


def prefix_file(path: str | os.PathLike[str]) -> Path:
    """The file that is meant by a path, by a run's folder, or by `hub:OWNER/NAME`, which is downloaded.

    Raises:
        CheckpointError: There is nothing of that name, or a folder without a prefix.
        ConfigError: `path` is no path.
        PrefixError: The hub cannot be reached, or has no such file.
    """
    if not isinstance(path, str | os.PathLike):
        inner = " (its `.prefix` is one)" if isinstance(getattr(path, "prefix", None), Prefix) else ""
        raise ConfigError(
            f"the prefix is {describe_value(path)}{inner}, but must be a path, hub:OWNER/NAME or a Prefix.",
            hint='give "runs/e2e/prefix.safetensors", say, or a list of prefixes, one per text.',
        )
    repository = repository_of(path)
    if repository is not None:
        return download(repository)
    try:
        return _on_this_machine(Path(path))
    except OSError as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read: {error.strerror or error}.", hint="check its permissions."
        ) from error


def _on_this_machine(path: Path) -> Path:
    if path.is_dir():
        if not (path / FILE).is_file():
            raise CheckpointError(
                f"there is no file {FILE} in the folder {str(path)!r}.",
                hint="give a file, or the --output folder of a training that came to its end; runs of other methods go "
                "with --run of `prefixtune generate` and `evaluate`.",
            )
        return path / FILE
    if is_repository(path) and path.suffix != ".safetensors" and not path.exists():
        raise CheckpointError(
            f"there is no file or folder {str(path)!r}.", hint=f"check the path; hub:{path} is fetched from the hub."
        )
    return path


def _check_fingerprint(
    header: Mapping[str, Any], backbone: Backbone, path: str | os.PathLike[str], allowed: bool
) -> None:
    origin = header.get("backbone")
    if allowed or not isinstance(origin, Mapping) or "fingerprint" not in origin:
        return
    if not fingerprints_match(str(origin["fingerprint"]), backbone.fingerprint):
        raise BackboneError(
            f"{str(path)!r} was trained for {origin.get('name')!r} with other weights than {backbone.name!r} "
            f"(fingerprint {_short(origin['fingerprint'])} against {_short(backbone.fingerprint)}).",
            hint="load the backbone that its header names; if you know that they are close: allow_other_backbone, or "
            "--allow-other-backbone of `prefixtune generate`, `evaluate` and `export`.",
        )


def _short(fingerprint: object) -> str:
    shape, _, samples = str(fingerprint).partition(":")
    return f"{shape[:8]}:{samples[:8]}"


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
