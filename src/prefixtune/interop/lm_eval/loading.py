"""The backbone and the prefixes that lm-eval's model is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import DEFAULT_BACKBONE, BackboneLike, as_backbone, load_backbone
from prefixtune.backbone.prefixes import PrefixLike, load_prefix, trained_adapter
from prefixtune.errors import BackboneError, ConfigError
from prefixtune.prefix.header import backbone_origin
from prefixtune.prefix.hub import prefix_file
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat, read_text_format

__all__ = ["check_batch_size", "check_writes", "load_fitting_backbone", "load_prefixes", "stored_chat"]

_BATCH_SIZE = 16


def check_batch_size(batch_size: int | str, most: int | None) -> int:
    """The number of requests that are computed together.

    Raises:
        ConfigError: It is below 1.
    """
    size = _BATCH_SIZE if str(batch_size).startswith("auto") else int(batch_size)
    if size < 1:
        raise ConfigError(f"batch_size is {batch_size}, but must be at least 1.", hint="leave it out for 16.")
    return size if most is None else min(size, most)


def load_prefixes(
    prefix: PrefixLike | None, task_prefixes: Mapping[str, PrefixLike | None]
) -> tuple[Prefix | None, dict[str, Prefix | None], dict[int, Path]]:
    """The prefixes of all tasks and of each, and by `id` the file of each; one that several tasks name is read once."""
    known: dict[str, Prefix] = {}
    files: dict[int, Path] = {}

    def read(one: PrefixLike | None) -> Prefix | None:
        if one is None or isinstance(one, Prefix):
            return one
        if str(one) not in known:
            file = prefix_file(one)
            known[str(one)] = load_prefix(file)
            files[id(known[str(one)])] = file
        return known[str(one)]

    return read(prefix), {task: read(one) for task, one in task_prefixes.items()}, files


def load_fitting_backbone(
    given: BackboneLike | None,
    prefixes: Sequence[Prefix],
    files: Sequence[Path | Prefix],
    *,
    dtype: str,
    device: str,
    allow_other_backbone: bool,
) -> tuple[Backbone, list[Prefix]]:
    """The backbone, and the prefixes as they were checked with it.

    Args:
        given: The model; None: the one that the prefixes name. One that is named is loaded with their LoRA adapter.
        prefixes: Of all tasks.
        files: Where each was read from; the prefix itself, if it was given.
        dtype: Of a model that is named.
        device: Likewise.
        allow_other_backbone: Accept prefixes of another fingerprint, when their shapes fit.

    Raises:
        BackboneError: It is an encoder, or a prefix does not fit it.
        ConfigError: A prefix is for labels, or they were trained with different adapters.
    """
    if given is None:
        names = [backbone_origin(prefix.header).name for prefix in prefixes]
        given = next((name for name in names if name), DEFAULT_BACKBONE)
    named = isinstance(given, str | Path)
    adapter = trained_adapter(files, prefixes) if named else None
    backbone = load_backbone(given, dtype=dtype, device=device, adapter=adapter) if named else as_backbone(given)
    if backbone.kind == "encoder":
        raise BackboneError(
            f"{backbone.name!r} is an encoder, which reads text and writes none.",
            hint="lm-eval's tasks need a model that writes.",
        )
    for prefix in prefixes:
        check_writes(prefix)
    return backbone, [load_prefix(one, backbone, allow_other_backbone=allow_other_backbone) for one in prefixes]


def check_writes(prefix: Prefix) -> None:
    """Refuse a prefix that was trained for a head: it writes no text.

    Raises:
        ConfigError: It is such a prefix.
    """
    if prefix.head is not None:
        raise ConfigError(
            "a prefix was trained with a head for labels, and lm-eval's tasks need one that writes text.",
            hint="measure it with `prefixtune evaluate`.",
        )


def stored_chat(prefixes: Sequence[Prefix | None]) -> TextFormat | None:
    """The text format of prefixes that were trained on conversations; None: there is none.

    Raises:
        ConfigError: They were trained with different templates or system messages.
        CheckpointError: A text format cannot be read.
    """
    formats = [None if prefix is None else read_text_format(prefix.header) for prefix in prefixes]
    chats = {(form.chat_template, form.system): form for form in formats if form is not None and form.is_chat}
    if len(chats) > 1:
        raise ConfigError(
            f"the prefixes were trained with {len(chats)} different chat templates or system messages, and lm-eval "
            "asks for one.",
            hint="measure one prefix at a time.",
        )
    return next(iter(chats.values()), None)
