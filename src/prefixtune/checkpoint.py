"""Files: the serving artifact (one small safetensors file) and the resumable training state.

An artifact holds `SITE.LAYER.key` and `SITE.LAYER.value` tensors of shape (H, P, D), `head.weight` and `head.bias`
where a head was trained, and a JSON header under the metadata key `prefixtune`. A state holds the trained module, the
optimizer and where the run stood. Both are written atomically; neither is ever a pickle.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prefixtune.attach import check_fits
from prefixtune.backbone import Backbone, fingerprints_match
from prefixtune.errors import BackboneError, CheckpointError, ConfigError
from prefixtune.files import atomic_path
from prefixtune.prefix import Head, KeyValue, Prefix

__all__ = [
    "FORMAT_VERSION",
    "POSITIONS",
    "load_prefix",
    "load_state",
    "load_weights",
    "make_header",
    "save_prefix",
    "save_state",
    "save_weights",
]

FORMAT_VERSION = 1

POSITIONS = {
    "decoder": "text starts at position P",
    "encoder-decoder": "text positions are not shifted",
    "encoder": "text positions are not shifted",
    "infix": "the source starts at position 0, the target P behind it",
}
"""The position convention by kind of model, recorded in every artifact for each site."""

_HEADER, _STATE, _WEIGHTS = "prefixtune", "prefixtune_state", "prefixtune_weights"
_NAME = re.compile(r"^(encoder|decoder|cross)\.(\d{1,5})\.(key|value)$")


def make_header(backbone: Backbone, **facts: Any) -> dict[str, Any]:
    """What an artifact says of its origin; `save_prefix` adds what it says of its tensors.

    Args:
        backbone: The model that it was trained for.
        **facts: More, such as `task`, `text_format`, `training`, `initialization`, `license`.
    """
    origin = {"name": backbone.name, "fingerprint": backbone.fingerprint, "kind": backbone.kind}
    return {"backbone": origin, **facts}


def _describe_tensors(prefix: Prefix) -> dict[str, Any]:
    origin = prefix.header.get("backbone")
    kind = origin.get("kind", "decoder") if isinstance(origin, Mapping) else "decoder"
    shifts = kind == "decoder" and prefix.sites == ("decoder",)
    if prefix.placement == "infix" and shifts:
        kind = "infix"
    return {
        "sites": list(prefix.sites),
        "prefix_length": {site: prefix.length(site) for site in prefix.sites},
        "positions": {site: POSITIONS[kind if shifts and site == "decoder" else "encoder"] for site in prefix.sites},
        "geometry": {
            site: {
                "num_layers": len(shapes),
                "num_kv_heads": [s.num_kv_heads for s in shapes],
                "head_dim": [s.key_dim for s in shapes],
            }
            for site, shapes in prefix.geometry.items()
        },
        "dtype": str(prefix.dtype).removeprefix("torch."),
        **({} if prefix.head is None else {"head": {"num_labels": len(prefix.head.bias)}}),
    }


def save_prefix(path: str | Path, prefix: Prefix, *, dtype: torch.dtype = torch.float32) -> Path:
    """Store a prefix as one file: the tensors and its header.

    Args:
        path: Ends with `.safetensors`.
        prefix: With its header; see `make_header`.
        dtype: float32, or bfloat16 for half the size.

    Raises:
        CheckpointError: The prefix holds NaN or infinity, or the path has another ending.
        PrefixError: The file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{str(path)!r} does not end with .safetensors.", hint=f"write to {path.stem}.safetensors."
        )
    stored = prefix.detach().to(dtype, "cpu")
    if not stored.is_finite():
        raise CheckpointError(f"the prefix for {str(path)!r} holds NaN or infinity.", hint="train it again.")
    header = {**prefix.header, "format_version": FORMAT_VERSION, **_describe_tensors(stored)}
    tensors = {
        f"{site}.{number}.{part}": tensor.contiguous()
        for site, layers in stored.layers.items()
        for number, pair in enumerate(layers)
        for part, tensor in zip(("key", "value"), pair, strict=True)
    }
    if stored.head is not None:
        tensors |= {"head.weight": stored.head.weight.contiguous(), "head.bias": stored.head.bias.contiguous()}
    with atomic_path(path) as temporary:
        _save(tensors, temporary, {_HEADER: json.dumps(header, ensure_ascii=False)})
    return path


def load_prefix(path: str | Path, backbone: Backbone | None = None, *, allow_other_backbone: bool = False) -> Prefix:
    """Read an artifact, checking all of it before any of it is used.

    Args:
        path: The file.
        backbone: Also check that the prefix was trained for this model.
        allow_other_backbone: Accept another fingerprint, when the shapes fit (a fine-tuned sister, say).

    Raises:
        CheckpointError: The file is missing, truncated, no prefix, of a newer format, or holds NaN or infinity; its
            header and its tensors disagree.
        BackboneError: Its shapes are not the backbone's, or it was trained for other weights.
    """
    tensors, metadata = _read(path)
    if _HEADER not in metadata:
        raise CheckpointError(
            f"{str(path)!r} is a safetensors file, but not a prefix.", hint="give a file that `prefixtune train` wrote."
        )
    header = _json(metadata[_HEADER], path)
    version = header.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION or version < 1:
        raise CheckpointError(
            f"{str(path)!r} has format version {version!r}, but this prefixtune reads up to {FORMAT_VERSION}.",
            hint="upgrade prefixtune.",
        )
    head = _head(tensors, path)
    prefix = Prefix(_layers(tensors, path), header, head)
    for key, fact in _describe_tensors(prefix).items():
        if key in header and header[key] != fact:
            what = key.replace("_", " ")
            raise CheckpointError(
                f"the header of {str(path)!r} says {what} {header[key]!r}, but its tensors say {fact!r}.",
                hint="the file was altered or made otherwise; get it again.",
            )
    if not prefix.is_finite():
        raise CheckpointError(f"{str(path)!r} holds NaN or infinity.", hint="get the file again, or train it again.")
    if backbone is not None:
        check_fits(prefix, backbone.geometry, backbone.name)
        if head is not None and head.weight.shape[1] != backbone.hidden_size:
            raise BackboneError(
                f"the head in {str(path)!r} is for hidden states of {head.weight.shape[1]}, but {backbone.name!r} has "
                f"{backbone.hidden_size}.",
                hint="load the backbone that its header names.",
            )
        _check_fingerprint(header, backbone, path, allow_other_backbone)
    return prefix


def _check_fingerprint(header: Mapping[str, Any], backbone: Backbone, path: str | Path, allowed: bool) -> None:
    origin = header.get("backbone")
    if allowed or not isinstance(origin, Mapping) or "fingerprint" not in origin:
        return
    if not fingerprints_match(str(origin["fingerprint"]), backbone.fingerprint):
        raise BackboneError(
            f"{str(path)!r} was trained for {origin.get('name')!r} with other weights than {backbone.name!r} "
            f"(fingerprint {_short(origin['fingerprint'])} against {_short(backbone.fingerprint)}).",
            hint="load the backbone that its header names, or pass allow_other_backbone "
            "(--allow-other-backbone) if you know that they are close.",
        )


def _short(fingerprint: object) -> str:
    shape, _, samples = str(fingerprint).partition(":")
    return f"{shape[:8]}:{samples[:8]}"


def _head(tensors: dict[str, Tensor], path: str | Path) -> Head | None:
    """Take the head out of the tensors, where there is one."""
    weight, bias = tensors.pop("head.weight", None), tensors.pop("head.bias", None)
    if weight is None and bias is None:
        return None
    fits = weight is not None and bias is not None and weight.dim() == 2 and bias.shape == weight.shape[:1]
    if not fits or weight is None or bias is None or not (weight.is_floating_point() and bias.is_floating_point()):
        raise CheckpointError(f"{str(path)!r} holds a head that is not whole.", hint="get the file again.")
    return Head(weight, bias)


def _layers(tensors: Mapping[str, Tensor], path: str | Path) -> dict[str, tuple[KeyValue, ...]]:
    """Tensors by name -> per site the layers in order; every fault is named."""
    found: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        match = _NAME.match(name)
        if match is None or not tensor.is_floating_point():
            raise CheckpointError(
                f"{str(path)!r} holds {name!r} of type {tensor.dtype}, which is no part of a prefix.",
                hint="give a file that `prefixtune train` wrote.",
            )
        site, number, part = match.groups()
        found.setdefault(site, {}).setdefault(int(number), {})[part] = tensor
    layers: dict[str, tuple[KeyValue, ...]] = {}
    for site, numbered in found.items():
        if sorted(numbered) != list(range(len(numbered))) or any(len(pair) != 2 for pair in numbered.values()):
            raise CheckpointError(f"{str(path)!r} lacks some layers of site {site!r}.", hint="get the file again.")
        layers[site] = tuple((numbered[n]["key"], numbered[n]["value"]) for n in range(len(numbered)))
    try:
        Prefix(layers)
    except ConfigError as error:
        raise CheckpointError(f"{str(path)!r}: {error.message}", hint="get the file again.") from error
    return layers


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
        facts = {**header, "format_version": FORMAT_VERSION}
        _save(kept, temporary, {_WEIGHTS: json.dumps(facts, ensure_ascii=False)})
    return path


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The reverse of `save_weights`.

    Raises:
        CheckpointError: The file is missing, truncated, something else or of a newer format.
    """
    tensors, metadata = _read(path)
    if _WEIGHTS not in metadata:
        raise CheckpointError(
            f"{str(path)!r} holds no weights of another method.",
            hint="give the weights.safetensors that `prefixtune train --method full` (or another) wrote.",
        )
    header = _json(metadata[_WEIGHTS], path)
    version = header.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{str(path)!r} has format version {version!r}, but this prefixtune reads {FORMAT_VERSION}.",
            hint="upgrade prefixtune.",
        )
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
        _save(kept, temporary, {_STATE: json.dumps({"format_version": FORMAT_VERSION, **facts})})


def load_state(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The reverse of `save_state`.

    Raises:
        CheckpointError: The file is missing, truncated or no state.
    """
    tensors, metadata = _read(path)
    if _STATE not in metadata:
        raise CheckpointError(
            f"{str(path)!r} is not a training state.", hint="resume a folder that `prefixtune train` made."
        )
    facts = _json(metadata[_STATE], path)
    if facts.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{str(path)!r} has state version {facts.get('format_version')!r}, not {FORMAT_VERSION}.",
            hint="resume it with the version of prefixtune that wrote it.",
        )
    return tensors, facts


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        # The library wraps the system's error, such as a full disk, into one of its own.
        raise OSError(str(error)) from error


def _read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no file {str(path)!r}.", hint="check the path.")
    try:
        with safe_open(path, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{str(path)!r} is no whole safetensors file: {error}.", hint="it may be truncated; get it again."
        ) from error


def _json(text: str, path: str | Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise CheckpointError(
            f"the header of {str(path)!r} is no JSON: {error}.", hint="get the file again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"the header of {str(path)!r} is no JSON object.", hint="get the file again.")
    return value
