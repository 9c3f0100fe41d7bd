"""The teacher: another model, a prefix, or the student itself with a text in view."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.distillation.config import DistillConfig
from prefixtune.distillation.reader import Reader
from prefixtune.distillation.wording import Wording, in_view
from prefixtune.errors import BackboneError, ConfigError
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat, read_text_format
from prefixtune.training.artifact import load_tuned
from prefixtune.training.run_folder import PREFIX_FILE, WEIGHTS_FILE

__all__ = ["Teacher", "check_same_tokens", "load_teacher", "teacher_files"]


@dataclass(frozen=True)
class Teacher:
    """A model that answers.

    Attributes:
        backbone: The model.
        name: What reports call it.
        prefix: What stands before every question; None: nothing, or the text that is in view.
        text_format: What it was trained with; None: nothing.
    """

    backbone: Backbone
    name: str
    prefix: Prefix | None = None
    text_format: TextFormat | None = None

    def reader(self, wording: Wording, chunks: Sequence[str], batch_size: int) -> Reader:
        """The teacher with the pieces of a text in view; without a text, with its own prefix."""
        views = [in_view(self.backbone, wording, chunk) for chunk in chunks]
        return Reader(self.backbone, wording, views or [self.prefix], batch_size)


def load_teacher(config: DistillConfig, student: Backbone) -> Teacher:
    """The teacher of a run: the student itself, unless another is named.

    Raises:
        BackboneError: It has another tokenizer than the student, or is of another kind.
        ConfigError: It is a prefix that writes no text, or stands where a text would be in view.
        PrefixError: It cannot be loaded.
    """
    name, root = config.teacher, Path(config.teacher)
    options: dict[str, Any] = {"dtype": config.dtype, "device": config.device}
    if not name:
        return Teacher(student, student.name)
    if root.name == WEIGHTS_FILE or (root / WEIGHTS_FILE).is_file():
        backbone, text_format = load_tuned(root if root.name == WEIGHTS_FILE else root / WEIGHTS_FILE, **options)
        teacher = Teacher(backbone, name, None, text_format)
    elif root.suffix == ".safetensors" or (root / PREFIX_FILE).is_file():
        return _prefix_teacher(config, root if root.suffix == ".safetensors" else root / PREFIX_FILE, student)
    elif (root / "adapter_config.json").is_file():
        teacher = Teacher(load_backbone(config.backbone, adapter=name, **options), name)
    else:
        teacher = Teacher(load_backbone(name, **options), name)
    check_same_tokens(student, teacher.backbone)
    return teacher


def _prefix_teacher(config: DistillConfig, path: Path, student: Backbone) -> Teacher:
    prefix = load_prefix(path, student)
    if config.document or config.prompt:
        raise ConfigError(
            f"the teacher {config.teacher!r} is a prefix, and a document or a prompt would stand in its place.",
            hint="name a model or a run of another method, or leave --document and --prompt out.",
        )
    if prefix.head is not None:
        raise ConfigError(
            f"the teacher {config.teacher!r} gives labels by a head, and writes no text to learn from.",
            hint="name a prefix that generates, or train one for the labels (`prefixtune train --classifier`).",
        )
    return Teacher(student, config.teacher, prefix, read_text_format(prefix.header))


def check_same_tokens(student: Backbone, teacher: Backbone) -> None:
    """Refuse a teacher whose token ids mean something else, or that is of another kind.

    Raises:
        BackboneError: They do, or it is.
    """
    if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab() or student.eos_id != teacher.eos_id:
        raise BackboneError(
            f"the teacher {teacher.name!r} has another tokenizer than {student.name!r}, or another end token.",
            hint="choose a teacher of the same family; its likeliest tokens are the student's labels.",
        )
    if student.kind != teacher.kind:
        raise BackboneError(
            f"the teacher {teacher.name!r} is of kind {teacher.kind!r}, but {student.name!r} of kind {student.kind!r}.",
            hint="choose a teacher of the same kind.",
        )


def teacher_files(teacher: str) -> list[tuple[str, int, str]]:
    """Name, size and a hash of the last megabyte of a teacher's files of weights, where it is on this machine."""
    path, found = Path(teacher), list[tuple[str, int, str]]()
    for part in [] if not teacher else [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        with open(part, "rb") as file:
            file.seek(max(part.stat().st_size - 2**20, 0))
            found.append((part.name, part.stat().st_size, hashlib.sha256(file.read()).hexdigest()))
    return found
