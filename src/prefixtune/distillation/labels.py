"""The teacher's likeliest tokens as the labels of examples, kept in a run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from prefixtune.backbone.batch import SoftLabels
from prefixtune.backbone.loss import label_logits
from prefixtune.data.batching import collate
from prefixtune.data.encoding import TokenizedExample
from prefixtune.distillation.inputs import Question
from prefixtune.distillation.reader import Progress, Reader
from prefixtune.distillation.wording import count_endings
from prefixtune.errors import BackboneError
from prefixtune.prefix.file import read_verified, save_file
from prefixtune.prefix.header import FORMAT_VERSION

__all__ = ["LABELS_FILE", "label_examples", "read_labels", "write_labels"]

LABELS_FILE = "teacher.safetensors"
"""The teacher's labels in a run's folder, of what is trained on and, behind it, of what is held out."""
_LABELS = "prefixtune_teacher"


@torch.no_grad()
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
    """
    counts = count_endings(teacher.backbone, questions, teacher.wording)
    labelled: dict[int, TokenizedExample] = {}
    for view, indices in teacher.by_view(questions):
        logits = label_logits(teacher.backbone, view, collate(teacher.backbone, [examples[index] for index in indices]))
        soft = SoftLabels.from_logits(logits[:, :vocabulary].float()).to(torch.device("cpu"))
        if not soft.is_valid(vocabulary):
            raise BackboneError(
                f"the teacher {teacher.backbone.name!r} gives numbers that are not finite: they are no labels.",
                hint="load it in another --dtype, such as float32 or bfloat16.",
            )
        for index, labels in zip(
            indices, soft.split([len(examples[index].targets[0]) for index in indices]), strict=True
        ):
            is_certain = questions[index].ended and not teacher.wording.tuned
            closed = _close(labels, examples[index].targets[0], counts[index] if is_certain else 0)
            labelled[index] = replace(examples[index], soft_targets=(closed,))
        on_batch(len(labelled))
    return [labelled[index] for index in range(len(examples))]


def _close(labels: SoftLabels, target: Sequence[int], closing: int) -> SoftLabels:
    """A target's labels; the last `closing` of them are certain."""
    if not closing:
        return labels
    kept = len(target) - closing
    certain = SoftLabels.from_labels(torch.tensor(target[kept:]), labels.k)
    return SoftLabels.cat([SoftLabels(labels.ids[:kept], labels.log_probs[:kept]), certain])


def write_labels(path: Path, examples: Sequence[TokenizedExample]) -> None:
    """Write the labels of examples to a file."""
    labels = SoftLabels.cat([part for example in examples for part in example.soft_targets])
    tensors = {"ids": labels.ids, "log_probs": labels.log_probs}
    save_file(path, tensors, _LABELS, {"format_version": FORMAT_VERSION})


def read_labels(path: Path, examples: Sequence[TokenizedExample]) -> list[TokenizedExample]:
    """The examples with their labels from a file.

    Raises:
        CheckpointError: The file is damaged.
    """
    tensors, _ = read_verified(path, _LABELS, "holds no labels of a teacher", "delete it, and resume.")
    parts = SoftLabels(tensors["ids"], tensors["log_probs"]).split([len(example.targets[0]) for example in examples])
    return [replace(example, soft_targets=(labels,)) for example, labels in zip(examples, parts, strict=True)]
