"""The teacher: who answers, and whose likeliest tokens are the labels. They are computed once, and kept in the run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.loss import label_logits
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.backbone.soft_labels import SoftLabels
from prefixtune.data.batching import collate
from prefixtune.data.encoding import TokenizedExample
from prefixtune.distillation.config import DistillConfig
from prefixtune.errors import BackboneError, CheckpointError, ConfigError
from prefixtune.prefix.file import metadata_with_checksum, read_verified, save_file
from prefixtune.prefix.header import FORMAT_VERSION
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat, read_text_format
from prefixtune.training.artifact import load_tuned
from prefixtune.training.data import TrainData
from prefixtune.training.folder import PREFIX_FILE, WEIGHTS_FILE
from prefixtune.utils.files import atomic_path

__all__ = [
    "LABELS_FILE",
    "Teacher",
    "label_examples",
    "load_teacher",
    "store_labels",
    "stored_labels",
    "with_labels",
]

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


def _kind(path: str) -> tuple[str, Path]:
    """What `--teacher` names: `weights`, `prefix`, `adapter` or `model`; and the file or folder."""
    root = Path(path)
    if (root / WEIGHTS_FILE).is_file():
        return "weights", root / WEIGHTS_FILE
    if (root / PREFIX_FILE).is_file():
        return "prefix", root / PREFIX_FILE
    if root.name == WEIGHTS_FILE:
        return "weights", root
    if root.suffix == ".safetensors":
        return "prefix", root
    if (root / "adapter_config.json").is_file():
        return "adapter", root
    return "model", root


def _other_tokens(teacher: str, student: str, what: str) -> BackboneError:
    return BackboneError(
        f"the teacher {teacher!r} has another tokenizer than {student!r}: {what}.",
        hint="choose a teacher of the same family; its likeliest tokens are the student's labels.",
    )


def load_teacher(config: DistillConfig, student: Backbone) -> Teacher:
    """The teacher of a run: the student itself, unless another is named.

    Raises:
        BackboneError: It has another tokenizer than the student, or is of another kind.
        ConfigError: It is a prefix that writes no text, or stands where a text would be in view.
        PrefixError: It cannot be loaded.
    """
    if not config.teacher:
        return Teacher(student, student.name)
    kind, path = _kind(config.teacher)
    options: dict[str, Any] = {"dtype": config.dtype, "device": config.device}
    if kind == "prefix":
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
    if kind == "weights":
        backbone, text_format = load_tuned(path, **options)
        teacher = Teacher(backbone, config.teacher, None, text_format)
    elif kind == "adapter":
        teacher = Teacher(load_backbone(config.backbone, adapter=str(path), **options), config.teacher)
    else:
        teacher = Teacher(load_backbone(config.teacher, **options), config.teacher)
    check_same_tokens(student, teacher.backbone)
    return teacher


def check_same_tokens(student: Backbone, teacher: Backbone) -> None:
    """Refuse a teacher whose token ids mean something else.

    Raises:
        BackboneError: They do.
    """
    own, other = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    if own != other or student.eos_id != teacher.eos_id:
        differ = sum(own.get(token) != index for token, index in other.items())
        what = f"{differ:,} of {len(other):,} tokens differ" if differ else "its end token or its vocabulary differs"
        raise _other_tokens(teacher.name, student.name, what)
    if student.kind != teacher.kind:
        raise BackboneError(
            f"the teacher {teacher.name!r} is of kind {teacher.kind!r}, but {student.name!r} of kind {student.kind!r}.",
            hint="choose a teacher of the same kind.",
        )


# --- labels ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def label_examples(
    teacher: Teacher,
    examples: Sequence[TokenizedExample],
    views: Sequence[Prefix | None],
    *,
    vocabulary: int,
    closing: Sequence[int],
    batch_size: int,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[TokenizedExample]:
    """The examples with the teacher's likeliest tokens at each of their labels.

    Args:
        teacher: Who is asked.
        examples: Questions with answers.
        views: Per example, what the teacher has in view.
        vocabulary: The student's number of logits; a larger teacher may have more, padded ones.
        closing: Per example, how many tokens at the end of its target are certain labels: a teacher that was not
            trained to end its answers does not say where they end.
        batch_size: Targets in one pass.
        on_batch: Called with the number of examples that are done.

    Raises:
        BackboneError: The teacher's numbers are not finite.
    """
    labelled: dict[int, TokenizedExample] = {}
    numbers: dict[int, int] = {}
    by_view = [numbers.setdefault(id(view), len(numbers)) for view in views]
    order = sorted(range(len(examples)), key=by_view.__getitem__)
    while order:
        view = views[order[0]]
        batch: list[int] = []
        while order and views[order[0]] is view and len(batch) < batch_size:
            batch.append(order.pop(0))
        collated = collate(teacher.backbone, [examples[index] for index in batch])
        logits = label_logits(teacher.backbone, view, collated)[:, :vocabulary]
        soft = SoftLabels.from_logits(logits.float()).to(torch.device("cpu"))
        if not soft.is_valid(vocabulary):
            raise BackboneError(
                f"the teacher {teacher.name!r} gives numbers that are not finite: they are no labels.",
                hint="load it in another --dtype, such as float32 or bfloat16.",
            )
        lengths = [len(target) for index in batch for target in examples[index].targets]
        parts = iter(soft.split(lengths))
        for index in batch:
            targets = examples[index].targets
            own = tuple(_close(next(parts), target, closing[index]) for target in targets)
            labelled[index] = replace(examples[index], soft_targets=own)
        on_batch(len(labelled))
    return [labelled[index] for index in range(len(examples))]


def _close(labels: SoftLabels, target: Sequence[int], closing: int) -> SoftLabels:
    """A target's labels, of which the last `closing` are certain."""
    if not closing:
        return labels
    kept = len(target) - closing
    certain = SoftLabels.from_labels(torch.tensor(target[kept:]), labels.k)
    return SoftLabels.cat([SoftLabels(labels.ids[:kept], labels.log_probs[:kept]), certain])


def store_labels(path: Path, examples: Sequence[TokenizedExample], digest: str) -> None:
    """Keep the labels of examples, atomically; `digest` is that of the run's data."""
    labels = SoftLabels.cat([part for example in examples for part in example.soft_targets])
    tensors = {"ids": labels.ids, "log_probs": labels.log_probs}
    header = {"format_version": FORMAT_VERSION, "data": digest, "k": labels.k}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata_with_checksum(_LABELS, header, tensors))


def stored_labels(
    path: Path, digest: str, examples: Sequence[TokenizedExample], vocabulary: int
) -> list[TokenizedExample] | None:
    """The examples with the labels that a run keeps; None: it keeps none yet.

    Args:
        path: The file.
        digest: Of the run's data.
        examples: Those that the labels belong to.
        vocabulary: The student's number of logits.

    Raises:
        CheckpointError: The file is damaged.
    """
    if not path.exists():
        return None
    tensors, header = read_verified(path, _LABELS, "holds no labels of a teacher", "delete it, and resume.")
    lengths = [len(target) for example in examples for target in example.targets]
    labels = _read_labels(path, tensors, vocabulary)
    if header.get("data") != digest or len(labels) != sum(lengths):
        raise CheckpointError(
            f"{str(path)!r} holds a teacher's labels of other data.", hint="start again in another --output."
        )
    parts = iter(labels.split(lengths))
    return [replace(example, soft_targets=tuple(next(parts) for _ in example.targets)) for example in examples]


def _read_labels(path: Path, tensors: Mapping[str, torch.Tensor], vocabulary: int) -> SoftLabels:
    """The labels in a file's tensors.

    Raises:
        CheckpointError: They are no distributions over the student's vocabulary.
    """
    ids, log_probs = tensors.get("ids"), tensors.get("log_probs")
    valid = (
        ids is not None
        and log_probs is not None
        and ids.dtype == torch.int32
        and log_probs.is_floating_point()
        and ids.ndim == log_probs.ndim == 2
        and len(ids) == len(log_probs)
        and 1 <= ids.shape[1] == log_probs.shape[1] - 1
    )
    labels = SoftLabels(ids, log_probs) if valid and ids is not None and log_probs is not None else None
    if labels is None or not labels.is_valid(vocabulary):
        raise CheckpointError(
            f"{str(path)!r} holds no labels for a vocabulary of {vocabulary:,}.", hint="delete it, and resume."
        )
    return labels


def with_labels(data: TrainData, examples: Sequence[TokenizedExample]) -> TrainData:
    """A run's data with labelled examples; its digest tells these labels from any other."""
    digest = hashlib.sha256(data.digest.encode())
    for example in examples:
        for labels in example.soft_targets:
            digest.update(labels.ids.numpy().tobytes())
            digest.update(labels.log_probs.numpy().tobytes())
    return replace(data, train=replace(data.train, examples=tuple(examples)), digest=digest.hexdigest())
