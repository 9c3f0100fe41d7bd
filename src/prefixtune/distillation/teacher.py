"""The teacher: another model, a prefix, or the student with a text in view; and its likeliest tokens as labels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.batch import SoftLabels
from prefixtune.backbone.checkpoint import find_checkpoint
from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.loss import teacher_labels
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.data.batching import collate
from prefixtune.data.encoding import TokenizedExample
from prefixtune.distillation.config import DistillConfig
from prefixtune.distillation.inputs import Question
from prefixtune.distillation.reader import Progress, Reader
from prefixtune.distillation.wording import Wording, count_endings, in_view
from prefixtune.errors import BackboneError, ConfigError
from prefixtune.inference.prompts import Prompt, check_positions
from prefixtune.prefix.file import read_verified, save_verified
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat, read_text_format
from prefixtune.training.artifact import load_tuned
from prefixtune.training.run_folder import PREFIX_FILE, WEIGHTS_FILE

LABELS_FILE = "teacher.safetensors"
"""The teacher's labels in a run's folder, of what is trained on and, behind it, of what is held out."""
_LABELS = "prefixtune_teacher"


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
        PrefixError: It cannot be loaded.
    """
    name = config.teacher
    options: dict[str, Any] = {"dtype": config.dtype, "device": config.device}
    if not name:
        return Teacher(student, student.name)
    match _kind(name):
        case "weights":
            backbone, text_format = load_tuned(_weights(name), **options)
            teacher = Teacher(backbone, name, None, text_format)
        case "prefix":
            prefix = load_prefix(name, student)
            return Teacher(student, name, prefix, read_text_format(prefix.header))
        case "adapter":
            teacher = Teacher(load_backbone(config.backbone, adapter=name, **options), name)
        case _:
            teacher = Teacher(load_backbone(name, **options), name)
    check_same_tokens(student, teacher.backbone)
    return teacher


def _weights(name: str) -> Path:
    return Path(name) if Path(name).name == WEIGHTS_FILE else Path(name, WEIGHTS_FILE)


def _kind(name: str) -> Literal["weights", "prefix", "adapter", "model"]:
    """What a teacher is, by its files."""
    if _weights(name).is_file():
        return "weights"
    if Path(name).suffix == ".safetensors" or Path(name, PREFIX_FILE).is_file():
        return "prefix"
    return "adapter" if Path(name, "adapter_config.json").is_file() else "model"


def check_teacher(config: DistillConfig) -> None:
    """Refuse a teacher that is not there or does not fit the task, before a model is loaded.

    Raises:
        ConfigError: It is a prefix that writes no text, or stands where a text would be in view.
        PrefixError: It cannot be read.
    """
    kind = _kind(config.teacher) if config.teacher else ""
    if kind == "model":
        find_checkpoint(config.teacher)
    if kind != "prefix":
        return
    prefix, name = load_prefix(config.teacher), repr(config.teacher)
    if config.document or config.prompt:
        what = f"the teacher {name} is a prefix, in whose place the text would stand."
        raise ConfigError(what, hint="name a model or another run.")
    if prefix.head is not None:
        raise ConfigError(f"the teacher {name} has a head, and writes no text.", hint="name a prefix that generates.")


def check_same_tokens(student: Backbone, teacher: Backbone) -> None:
    """Refuse a teacher whose token ids mean something else, or that is of another kind.

    Raises:
        BackboneError: They do, or it is.
    """
    own, other = ((one.kind, one.eos_id, one.tokenizer.get_vocab()) for one in (student, teacher))
    if own != other:
        raise BackboneError(
            f"the teacher {teacher.name!r} has another kind, tokenizer or end token than {student.name!r}.",
            hint="choose one of the same family.",
        )


def label_examples(
    teacher: Reader,
    examples: Sequence[TokenizedExample],
    questions: Sequence[Question],
    vocabulary: int,
    on_batch: Progress = lambda done: None,
) -> list[TokenizedExample]:
    """The examples with the teacher's likeliest tokens at each of their labels.

    The tokens that end an answer are certain labels, unless the teacher was trained with this wording: another does not
    say where an answer ends.

    Args:
        teacher: Who is asked.
        examples: The questions with their answers as tokens.
        questions: The same.
        vocabulary: The student's number of logits; a larger teacher may have more, padded ones.
        on_batch: Called with the number of examples that are done.

    Raises:
        BackboneError: The teacher's numbers are not finite.
        RequestError: A question does not fit the teacher's positions with what is in view.
    """
    asked = [
        Prompt(list(example.prompt), teacher.views[question.chunk], len(example.targets[0]))
        for example, question in zip(examples, questions, strict=True)
    ]
    check_positions(teacher.backbone, asked, "shorten the questions, or choose another teacher.")
    counts = count_endings(teacher.backbone, questions, teacher.wording)
    labelled: dict[int, TokenizedExample] = {}
    for view, indices in teacher.by_view(questions):
        batch = collate(teacher.backbone, [examples[index] for index in indices])
        targets = [examples[index].targets[0] for index in indices]
        lengths = [*map(len, targets)]
        found = teacher_labels(teacher.backbone, view, batch, vocabulary=vocabulary, lengths=lengths)
        if any(labels.log_probs.isnan().any() for labels in found):
            raise BackboneError(
                f"the teacher {teacher.backbone.name!r} gives numbers that are not finite.",
                hint="choose another --dtype.",
            )
        for index, target, labels in zip(indices, targets, found, strict=True):
            if questions[index].ended and not teacher.wording.tuned:
                kept = len(target) - counts[index]
                certain = SoftLabels.from_labels(torch.tensor(target[kept:]), labels.k)
                labels = SoftLabels.cat([SoftLabels(labels.ids[:kept], labels.log_probs[:kept]), certain])
            labelled[index] = replace(examples[index], soft_targets=(labels,))
        on_batch(len(labelled))
    return [labelled[index] for index in range(len(examples))]


def write_labels(path: Path, examples: Sequence[TokenizedExample]) -> None:
    """Write the labels of examples to a file."""
    labels = SoftLabels.cat([part for example in examples for part in example.soft_targets])
    tensors = {"ids": labels.ids, "log_probs": labels.log_probs}
    save_verified(path, tensors, _LABELS, {})


def read_labels(path: Path, examples: Sequence[TokenizedExample]) -> list[TokenizedExample]:
    """The examples with their labels from a file.

    Raises:
        CheckpointError: The file is damaged.
    """
    tensors, _ = read_verified(path, _LABELS, "holds no labels of a teacher", "delete it, and resume.")
    parts = SoftLabels(tensors["ids"], tensors["log_probs"]).split([len(example.targets[0]) for example in examples])
    return [replace(example, soft_targets=(labels,)) for example, labels in zip(examples, parts, strict=True)]


def teacher_files(teacher: str) -> list[tuple[str, int, str]]:
    """Name, size and a hash of the last megabyte of a teacher's files of weights, where it is on this machine."""
    path, found = Path(teacher), list[tuple[str, int, str]]()
    for part in [] if not teacher else [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        with open(part, "rb") as file:
            file.seek(max(part.stat().st_size - 2**20, 0))
            found.append((part.name, part.stat().st_size, hashlib.sha256(file.read()).hexdigest()))
    return found
