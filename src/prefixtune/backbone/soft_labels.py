"""A teacher's likeliest tokens at each label, and the loss of a student against them.

The divergence is computed over k + 1 outcomes: the teacher's k likeliest tokens, and "any other token":

    KL = sum_i p_i (log p_i - log q_i) + p_rest (log p_rest - log q_rest)

with p of the teacher and q of the student, both over the whole vocabulary. It is never negative, zero if and only if
both agree on every outcome, and at most the divergence over the whole vocabulary (joining outcomes loses information).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["TOP_K", "SoftLabels"]


TOP_K = 20
"""How many of the teacher's tokens are kept for a label."""


@dataclass(frozen=True, eq=False)
class SoftLabels:
    """The teacher's distribution at each of N labels.

    Attributes:
        ids: Its k likeliest tokens; one with probability 0 may be there several times.
        log_probs: The logarithms of their probabilities, and in the last column that of all other tokens together.
    """

    ids: Int[Tensor, "N k"]
    log_probs: Float[Tensor, "N k1"]

    @classmethod
    def from_logits(cls, logits: Float[Tensor, "N V"], k: int = TOP_K) -> SoftLabels:
        """What a teacher's logits say, in float32 (float64 stays); all k of a smaller vocabulary."""
        logarithms = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
        kept, ids = logarithms.topk(min(k, logits.shape[1]), dim=-1)
        rest = logarithms.scatter(1, ids, -torch.inf).logsumexp(dim=-1, keepdim=True)
        return cls(ids.int(), torch.cat([kept, rest], dim=1))

    @classmethod
    def from_labels(cls, labels: Int[Tensor, " N"], k: int = TOP_K) -> SoftLabels:
        """Certain labels: the divergence from them is the cross-entropy."""
        log_probs = torch.full((len(labels), k + 1), -torch.inf)
        log_probs[:, 0] = 0.0
        return cls(labels.int()[:, None].expand(-1, k).contiguous(), log_probs)

    @classmethod
    def cat(cls, parts: Sequence[SoftLabels]) -> SoftLabels:
        """One after the other; all have the same k."""
        return cls(torch.cat([part.ids for part in parts]), torch.cat([part.log_probs for part in parts]))

    @property
    def k(self) -> int:
        """Tokens per label."""
        return int(self.ids.shape[1])

    def __len__(self) -> int:
        return len(self.ids)

    def is_valid(self, vocabulary: int) -> bool:
        """Whether each label is a distribution over tokens of such a vocabulary, up to rounding."""
        if not len(self):
            return True
        known = bool(((self.ids >= 0) & (self.ids < vocabulary)).all())
        total = self.log_probs.double().exp().sum(dim=1)
        # Compared so that a NaN is no distribution.
        return known and bool(((self.log_probs <= 1e-3).all(dim=1) & ((total - 1).abs() < 0.01)).all())

    def split(self, lengths: Sequence[int]) -> list[SoftLabels]:
        """As many labels each as `lengths` says."""
        pairs = zip(self.ids.split(list(lengths)), self.log_probs.split(list(lengths)), strict=True)
        return [SoftLabels(ids, log_probs) for ids, log_probs in pairs]

    def to(self, device: torch.device) -> SoftLabels:
        """On a device."""
        return SoftLabels(self.ids.to(device), self.log_probs.to(device))

    def losses(self, logits: Float[Tensor, "N V"], rows: slice, slopes: Tensor | None) -> Float[Tensor, " _N"]:
        """The divergence of some rows from the student's logits there, in nats.

        Args:
            logits: The student's, one row per label.
            rows: Which.
            slopes: Where the gradient by the logits goes; None: it is not wanted.
        """
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        chosen, wanted = self.ids[rows].long(), self.log_probs[rows].to(dtype)
        logarithms = torch.log_softmax(logits[rows], dim=-1, dtype=dtype)
        # A certain label fills its row's other places with itself: log q of the others must not count it.
        rest = logarithms.scatter(1, chosen, -torch.inf).logsumexp(dim=-1, keepdim=True)
        student = torch.cat([logarithms.gather(1, chosen), rest], dim=1)
        probabilities = wanted.exp()
        if slopes is not None:
            # d KL / d logit_j: q_j - p_j for a kept token; q_j (1 - p_rest / q_rest) for any other.
            share = torch.where(probabilities[:, -1:] > 0, (wanted[:, -1:] - rest).exp(), 0.0)
            student_probs = logarithms.exp()
            kept = student_probs.gather(1, chosen) * share - probabilities[:, :-1]
            slopes[rows] = (student_probs * (1 - share)).scatter_add_(1, chosen, kept)
        return torch.where(probabilities != 0, probabilities * (wanted - student), 0.0).sum(dim=1)
