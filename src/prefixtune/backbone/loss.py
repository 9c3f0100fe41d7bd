"""The loss of a batch: next-token prediction at chosen positions, or a head's labels; and a teacher's labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.batch import Batch, SoftLabels
from prefixtune.backbone.head import Compute, head_pass
from prefixtune.errors import ConfigError
from prefixtune.prefix.prefix import Head, Prefix

Prefixes = Prefix | Sequence[Prefix | None] | None
"""What is in front of a batch: one prefix for all, or one for each index that its packing counts through."""


def cross_entropy(labels: Int[Tensor, " N"]) -> Compute:
    """For `head_pass`: each label's loss in nats, in float32, with d loss / d logits = softmax - one-hot."""

    def compute(logits: Tensor, rows: slice, slopes: Tensor | None) -> tuple[Tensor]:
        chosen = labels[rows, None]
        logarithms = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        losses = -logarithms.gather(1, chosen)[:, 0]
        if slopes is not None:
            probabilities = logarithms.exp_()
            slopes.copy_(probabilities.scatter_add_(1, chosen, torch.full_like(chosen, -1, dtype=torch.float32)))
        return (losses,)

    return compute


def divergence(labels: SoftLabels) -> Compute:
    """For `head_pass`: the divergence of each label's distribution from the student's, in nats (`SoftLabels`)."""
    return lambda logits, rows, slopes: (labels.losses(logits, rows, slopes),)


def batch_loss(backbone: Backbone, prefix: Prefixes, batch: Batch, *, head: Head | None = None) -> Float[Tensor, " N"]:
    """Each label's loss in a batch, in nats; differentiable in the prefix.

    With soft labels, it is the divergence of the teacher's distribution from the model's (see `backbone.batch`).

    Args:
        backbone: The frozen model.
        prefix: One for all; or one for each index that the batch's packing counts through.
        batch: Labels and what they are predicted from.
        head: Of labels that are no tokens, in place of the prefix's own.
    """
    if batch.labelled:
        head = head or (prefix.head if isinstance(prefix, Prefix) else None)
        if head is None:
            raise ConfigError("labels need a prefix that was trained with a head.", hint="train one first.")
        hidden = hidden_states_at(backbone, prefix, batch)
        return F.cross_entropy(head(hidden).float(), batch.labels.to(hidden.device), reduction="none")
    hidden, labels = head_inputs(backbone, prefix, batch)
    compute = divergence(labels) if isinstance(labels, SoftLabels) else cross_entropy(labels)
    return head_pass(backbone.head, hidden, compute)[0]


def batch_hits(backbone: Backbone, prefix: Prefixes, batch: Batch) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """Each label's loss in a batch, and whether it is the likeliest token; the labels are certain."""
    hidden, labels = head_inputs(backbone, prefix, batch)
    losses = cross_entropy(labels)

    def compute(logits: Tensor, rows: slice, slopes: Tensor | None) -> tuple[Tensor, ...]:
        return *losses(logits, rows, slopes), logits.argmax(dim=-1) == labels[rows]

    found, hits = head_pass(backbone.head, hidden, compute)
    return found, hits


@torch.no_grad()
def teacher_labels(
    backbone: Backbone, prefix: Prefixes, batch: Batch, *, vocabulary: int | None = None, lengths: Sequence[int]
) -> list[SoftLabels]:
    """What a teacher says at a batch's labels: its likeliest tokens, on the CPU.

    Args:
        backbone: The teacher.
        prefix: In front of it.
        batch: The labels.
        vocabulary: The student's number of logits; a larger teacher may have more, padded ones.
        lengths: Labels of each target, as they are returned.
    """

    def compute(logits: Tensor, rows: slice, slopes: Tensor | None) -> tuple[Tensor, ...]:
        soft = SoftLabels.from_logits(logits[:, :vocabulary])
        return soft.ids, soft.log_probs

    ids, log_probs = head_pass(backbone.head, head_inputs(backbone, prefix, batch)[0], compute)
    return SoftLabels(ids.cpu(), log_probs.cpu()).split(lengths)


def head_inputs(backbone: Backbone, prefix: Prefixes, batch: Batch) -> tuple[Float[Tensor, "N E"], Any]:
    """What the model's head reads at a batch's labels, and the labels (or `SoftLabels`) on the same device."""
    return _at_labels(backbone.head.inputs, backbone, prefix, batch)


def hidden_states_at(backbone: Backbone, prefix: Prefixes, batch: Batch) -> Float[Tensor, "N E"]:
    """The hidden states at a batch's labels: (N, d)."""
    return _at_labels(backbone.hidden_states, backbone, prefix, batch)[0]


def _at_labels(run: Callable[..., Tensor], backbone: Backbone, prefix: Prefixes, batch: Batch) -> tuple[Tensor, Any]:
    """Of what a run of the model gives at every position: that at the labels; and these, sent with the batch."""
    soft = batch.soft_labels
    own = {"labels": batch.labels} if soft is None else {"ids": soft.ids, "log_probs": soft.log_probs}
    given = batch.inputs(backbone.device, positions=batch.label_positions, **own)
    positions, sent = given.pop("positions"), [given.pop(name) for name in own]
    found = run(**given, prefixes=prefix)
    positions, sent = positions.to(found.device), [tensor.to(found.device) for tensor in sent]
    labels = sent[0] if soft is None else SoftLabels(*sent)
    return found[positions // batch.width, positions % batch.width], labels
