"""The loss of each row with a prefix, and intervals of the loss and of its changes over the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.loss import batch_loss, hidden_states_at, token_losses
from prefixtune.data.batching import collate
from prefixtune.data.encoding import TokenizedExample
from prefixtune.evaluation.metrics.base import ItemStatistics
from prefixtune.evaluation.metrics.significance import Measurement, bootstrap
from prefixtune.explain.subject import Subject
from prefixtune.prefix.prefix import Head, Prefix

__all__ = ["RowLosses", "change", "row_losses", "rows_of"]


@dataclass(frozen=True)
class RowLosses:
    """Per row, the sum of its labels' losses in nats, and how many labels it has; a text's windows are one row."""

    sums: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def mean(self) -> float:
        """The loss per label (per token, where targets are texts)."""
        return sum(self.sums) / sum(self.counts)

    def describe(self, seed: int) -> dict[str, object]:
        """The loss per label, and its 95 % bootstrap interval over the rows."""
        return {"loss": self.mean, "interval": _interval(self.sums, self.counts, seed)}


def change(other: RowLosses, whole: RowLosses, seed: int) -> dict[str, object]:
    """How much larger the loss per label is than with the whole prefix, and the paired interval over the rows."""
    differences = [a - b for a, b in zip(other.sums, whole.sums, strict=True)]
    return {"change": other.mean - whole.mean, "interval": _interval(differences, whole.counts, seed)}


def _interval(sums: Sequence[float], counts: Sequence[int], seed: int) -> list[float] | None:
    if len(sums) < 2:
        return None
    values = np.array([sums, counts], dtype=float).T
    statistics = ItemStatistics(values, lambda total: float(total[0] / total[1]), "loss per label")
    measured = Measurement("loss", False, statistics, lambda items: statistics)
    return list(bootstrap(measured, seed=seed))


def row_losses(subject: Subject, prefix: Prefix | None, hidden: Sequence[int] = ()) -> RowLosses:
    """Each row's loss with a prefix in front (None: none), whose `hidden` positions are not seen (`Group.hidden`)."""
    rows = [replace(row, hidden=tuple(hidden)) for row in subject.tokenized]
    losses = rows_of(subject.backbone, rows, prefix, subject.prefix.head, subject.limits.batch_size)
    if not subject.origins:
        return losses
    sums, counts = dict.fromkeys(subject.origins, 0.0), dict.fromkeys(subject.origins, 0)
    for origin, one, count in zip(subject.origins, losses.sums, losses.counts, strict=True):
        sums[origin] += one
        counts[origin] += count
    return RowLosses(tuple(sums.values()), tuple(counts.values()))


@torch.no_grad()
def rows_of(
    backbone: Backbone, rows: Sequence[TokenizedExample], prefix: Prefix | None, head: Head | None, batch_size: int
) -> RowLosses:
    """Each row's loss; with a head, that of its labels."""
    sums: list[float] = []
    for first in range(0, len(rows), batch_size):
        batch = collate(backbone, rows[first : first + batch_size])
        if batch.labelled and head is not None:
            hidden = hidden_states_at(backbone, prefix, batch)
            losses = token_losses(head(hidden), batch.labels.to(hidden.device))
        else:
            losses = batch_loss(backbone, prefix, batch)
        total = torch.zeros(batch.num_targets).index_add_(0, batch.target_index, losses.float().cpu())
        sums += total.tolist()
    return RowLosses(tuple(sums), tuple(len(row.targets[0]) for row in rows))
