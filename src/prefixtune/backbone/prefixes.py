"""Prefixes for a backbone: read, checked against it, also before they are served, and given a header that names it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import BackboneLike, as_backbone
from prefixtune.backbone.packaged import DEFAULT_BACKBONE
from prefixtune.errors import BackboneError, CheckpointError, ConfigError, PrefixError, short_repr
from prefixtune.prefix.chat_format import is_allowed
from prefixtune.prefix.fingerprint import fingerprints_match
from prefixtune.prefix.folder import ENDING
from prefixtune.prefix.header import backbone_origin
from prefixtune.prefix.hub import prefix_file
from prefixtune.prefix.prefix import Prefix, check_fits, read_artifact, read_outline
from prefixtune.prefix.text_format import read_text_format


def make_header(backbone: Backbone, **facts: Any) -> dict[str, Any]:
    """What an artifact says of its origin, and how its keys can be moved; `save_prefix` adds what its tensors are.

    Args:
        backbone: The model that it was trained for.
        **facts: More, such as `task`, `text_format`, `training`, `initialization`, `license`.
    """
    origin = {"name": backbone.name, "fingerprint": backbone.fingerprint, "kind": backbone.kind}
    header: dict[str, Any] = {"backbone": origin}
    # A backbone whose keys cannot be moved still trains prefixes: they are used alone.
    with contextlib.suppress(BackboneError):
        header["rotation"] = backbone.rotation.to_header()
    return {**header, **facts}


PrefixLike = Prefix | str | os.PathLike[str]
"""Whatever a caller may give as a prefix: a `Prefix`, a path, or `hub:OWNER/NAME`."""


def as_prefix(prefix: PrefixLike | None, backbone: Backbone | None = None) -> Prefix | None:
    """The prefix that a caller means, on the backbone's device: it is not copied there once per text or pass.

    Args:
        prefix: What `load_prefix` takes; or None.
        backbone: The model that it is used with.

    Raises:
        BackboneError: It was trained for another model.
        CheckpointError: The file is missing or wrong.
        ConfigError: It is something else.
        PrefixError: The hub cannot be reached.
    """
    loaded = None if prefix is None else load_prefix(prefix, backbone)
    return loaded if loaded is None or backbone is None else loaded.to(device=backbone.device)


def load_prefix(
    path: PrefixLike, backbone: BackboneLike | None = None, *, allow_other_backbone: bool = False
) -> Prefix:
    """Read an artifact, checking all of it before any of it is used.

    Args:
        path: The file; the folder of a run, which holds one; or `hub:OWNER/NAME`, a repository of the hub, which is
            downloaded. A `Prefix` is checked and returned.
        backbone: Also check that the prefix was trained for this model.
        allow_other_backbone: Accept another fingerprint, when the shapes fit (a fine-tuned sister, say). The header of
            what is returned then has none, so that it is accepted wherever it is used.

    Raises:
        CheckpointError: The file is missing, truncated, damaged, no prefix, of an unknown version, or holds NaN or
            infinity; its header and its tensors disagree.
        BackboneError: Its shapes are not the backbone's, or it was trained for other weights.
        ConfigError: `path` or `backbone` is something else.
        PrefixError: The hub cannot be reached, or has no such file.
    """
    prefix = path if isinstance(path, Prefix) else read_artifact(prefix_file(path))
    if backbone is None:
        return prefix
    name = "the prefix" if isinstance(path, Prefix) else repr(str(path))
    backbone, origin = as_backbone(backbone), backbone_origin(prefix.header)
    check_fits(prefix, backbone.geometry, backbone.name)
    if prefix.head is not None and (width := prefix.head.weight.shape[1]) != backbone.head_size:
        what = f"the head in {name} is for hidden states of {width}, but {backbone.name!r} has {backbone.head_size}."
        raise BackboneError(what, hint="load the backbone that its header names.")
    if not origin.fingerprint or fingerprints_match(origin.fingerprint, backbone.fingerprint):
        return prefix
    if allow_other_backbone:
        named = {key: value for key, value in prefix.header["backbone"].items() if key != "fingerprint"}
        return replace(prefix, header={**prefix.header, "backbone": named})
    raise BackboneError(
        f"{name} was trained for {origin.name!r} with other weights than {backbone.name!r} "
        f"(fingerprint {_short(origin.fingerprint)} against {_short(backbone.fingerprint)}).",
        hint="load the backbone that its header names; if you know that they are close: allow_other_backbone, or "
        "--allow-other-backbone of `prefixtune generate`, `evaluate` and `export`.",
    )


def named_backbone(prefixes: Sequence[Prefix]) -> str:
    """The backbone that prefixes were trained for; one that names none goes along. Without any, the embedded one.

    Raises:
        ConfigError: They name several, or none.
    """
    names = {backbone_origin(prefix.header).name for prefix in prefixes} - {""}
    if len(names) > 1 or (prefixes and not names):
        named = f"different backbones: {', '.join(sorted(names))}" if names else "no backbone"
        hint = 'name the model: load("smollm2-135m", prefix), or --backbone.'
        raise ConfigError(f"the prefixes name {named}.", hint=hint)
    return names.pop() if names else DEFAULT_BACKBONE


def trained_adapter(prefixes: Sequence[Prefix]) -> str | None:
    """The folder of the LoRA adapter that prefixes were trained on, as the run was given it; None: there is none.

    Raises:
        ConfigError: They were trained on different ones, or on one that is not there.
    """
    adapters = sorted({str(prefix.header.get("adapter") or "") for prefix in prefixes})
    if len(adapters) > 1 or (adapters and adapters[0] and not os.path.isdir(adapters[0])):
        what = f"the prefixes were trained on the LoRA adapters {short_repr(adapters)}: several, or no such folder."
        raise ConfigError(what, hint="name the one to load: adapter= of load, or --adapter, where a command has it.")
    return (adapters[0] or None) if adapters else None


def _short(fingerprint: str) -> str:
    return ":".join(part[:8] for part in fingerprint.split(":"))


class PrefixValidator:
    """Reads and checks prefix files before they are served.

    Args:
        backbone: The model that they must fit; one without weights, from `load_tokenizer`, fits every header.
        max_bytes: Largest prefix, in the backbone's dtype.
    """

    def __init__(self, backbone: Backbone, max_bytes: int) -> None:
        self.backbone, self.max_bytes = backbone, max_bytes

    def read_header(self, path: Path) -> Mapping[str, Any]:
        """Check a file by its header alone, and return that.

        Raises:
            CheckpointError: It is not a prefix, does not fit the backbone, or cannot be served.
            OSError: It cannot be read.
        """
        outline = read_outline(path)
        if not self.backbone.geometry:
            # Without its weights, a backbone's shapes are unknown: whoever loads it compares them.
            return outline.header
        text_format, num_bytes = read_text_format(outline.header), outline.num_parameters * self.backbone.dtype.itemsize
        faults = {
            "it has a chat template of its own, which nobody named (--chat-templates)": text_format is not None
            and not is_allowed(text_format.chat_template),
            "it has a head, but no labels": outline.head is not None and not outline.header.get("labels"),
            "it was trained together with a LoRA adapter": bool(outline.header.get("adapter")),
            f"it takes {num_bytes:,} bytes, but all prefixes together may take {self.max_bytes:,}": num_bytes
            > self.max_bytes,
        }
        if reasons := [fault for fault, applies in faults.items() if applies]:
            raise CheckpointError(f"{'; '.join(reasons)}.", hint="use `prefixtune inspect` to see what it is.")
        try:
            return load_prefix(outline, self.backbone).header
        except BackboneError as error:
            raise CheckpointError(error.message, hint=error.hint) from error

    def load(self, path: Path, name: str, *, exact: bool = False) -> Prefix:
        """Read and check a whole file, from a copy: others may write to the file meanwhile.

        Args:
            path: The file.
            name: What messages call it, and not by its path.
            exact: In the file's dtype and on the CPU, not in the backbone's; so always if it has no weights.

        Raises:
            CheckpointError: It is broken or does not fit the backbone.
            PrefixError: It cannot be read now.
        """
        with tempfile.TemporaryDirectory(prefix="prefixtune-") as folder:
            copy = Path(folder) / f"{name}{ENDING}"
            try:
                shutil.copyfile(path, copy)
                # Not mapped from the file, as the engine reads it as it is.
                prefix = (load_prefix(copy, self.backbone) if self.backbone.geometry else read_artifact(copy)).detach()
                if self.backbone.geometry and not exact:
                    prefix = prefix.to(self.backbone.dtype, self.backbone.device)
            except OSError as error:
                raise PrefixError(f"cannot read {name!r} now: {error.strerror}.", hint="try again.") from error
            except PrefixError as error:
                raise CheckpointError(error.message.replace(str(copy), name), hint=error.hint) from error
        if not prefix.is_finite():
            what = f"{name!r} has numbers that are too large for {self.backbone.dtype}."
            raise CheckpointError(what, hint="serve in float32 or bfloat16.")
        return prefix
