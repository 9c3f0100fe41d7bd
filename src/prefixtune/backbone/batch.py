"""One batch: its tokens, its labels, and where these are predicted; labels may be a teacher's distributions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from prefixtune.attention.packing import Packing


class Front(NamedTuple):
    """What is in front of an example while it is trained on.

    Attributes:
        length: The first positions of the prefix that trains, as if there were no others; None: all of it.
        company: The numbers of the others that stand beside it; empty: it is alone.
    """

    length: int | None = None
    company: tuple[int, ...] = ()


WHOLE = Front()
"""All of the prefix, alone."""

TOP_K = 20
"""How many of the teacher's tokens are kept for a label."""


@dataclass(frozen=True, eq=False)
class SoftLabels:
    """The teacher's distribution at each of N labels.

    The divergence is computed over k + 1 outcomes: the teacher's k likeliest tokens, and "any other token":

        KL = sum_i p_i (log p_i - log q_i) + p_rest (log p_rest - log q_rest)

    with p of the teacher and q of the student, both over the whole vocabulary. It is never negative, zero if and only
    if both agree on every outcome, and at most the divergence over the whole vocabulary (joining outcomes loses
    information).

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

    def split(self, lengths: Sequence[int]) -> list[SoftLabels]:
        """As many labels each as `lengths` says."""
        pairs = zip(self.ids.split(list(lengths)), self.log_probs.split(list(lengths)), strict=True)
        return [SoftLabels(ids, log_probs) for ids, log_probs in pairs]

    def to(self, device: torch.device) -> SoftLabels:
        """On a device."""
        return SoftLabels(self.ids.to(device), self.log_probs.to(device))

    def losses(self, logits: Float[Tensor, "_N V"], rows: slice, slopes: Tensor | None) -> Float[Tensor, " _N"]:
        """The divergence of some labels from the student's logits, in nats.

        Args:
            logits: The student's, one row for each of these labels.
            rows: Which.
            slopes: Where the gradient by these logits goes; None: it is not wanted.
        """
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        chosen, wanted = self.ids[rows].long(), self.log_probs[rows].to(dtype)
        logarithms = torch.log_softmax(logits, dim=-1, dtype=dtype)
        # A certain label fills its row's other places with itself: log q of the others must not count it.
        rest = logarithms.scatter(1, chosen, -torch.inf).logsumexp(dim=-1, keepdim=True)
        student = torch.cat([logarithms.gather(1, chosen), rest], dim=1)
        probabilities = wanted.exp()
        if slopes is not None:
            # d KL / d logit_j: q_j - p_j for a kept token; q_j (1 - p_rest / q_rest) for any other.
            share = torch.where(probabilities[:, -1:] > 0, (wanted[:, -1:] - rest).exp(), 0.0)
            student_probs = logarithms.exp_()
            kept = student_probs.gather(1, chosen) * share - probabilities[:, :-1]
            slopes.copy_(student_probs.mul_(1 - share).scatter_add_(1, chosen, kept))
        return torch.where(probabilities != 0, probabilities * (wanted - student), 0.0).sum(dim=1)


@dataclass(frozen=True)
class Batch:
    """One packed row, or padded rows.

    Attributes:
        input_ids: The tokens; of an encoder-decoder, the sources.
        label_positions: Where a label is predicted, counted through all rows of logits; logits are needed here only.
        labels: What is predicted there.
        target_index: Which target a label belongs to, counted from 0.
        packing: Which positions of a packed row see which; None: rows are padded.
        attention_mask: Padded rows only: 1 where a token is real.
        decoder_input_ids: Encoder-decoder only: what the decoder reads.
        decoder_attention_mask: Padded rows of an encoder-decoder only.
        source_rows: Padded rows of an encoder-decoder only: which source each target looks at.
        labelled: The labels are those of a head, not tokens.
        fronts: What is in front: the same for all rows, or as many as the packing's prefix index counts through.
        hidden: Padded rows only: positions of the prefix that each row of `input_ids` does not see, as `Group.hidden`
            has them in a packed row; None: every row sees all.
        soft_labels: A teacher's distribution at each label, which the loss compares with; None: the labels are certain.
    """

    input_ids: Int[Tensor, "R T"]
    label_positions: Int[Tensor, " N"]
    labels: Int[Tensor, " N"]
    target_index: Int[Tensor, " N"]
    packing: Packing | None = None
    attention_mask: Int[Tensor, "R T"] | None = None
    decoder_input_ids: Int[Tensor, "Rd Td"] | None = None
    decoder_attention_mask: Int[Tensor, "Rd Td"] | None = None
    source_rows: Int[Tensor, " Rd"] | None = None
    labelled: bool = False
    fronts: tuple[Front, ...] = (WHOLE,)
    hidden: tuple[tuple[int, ...], ...] | None = None
    soft_labels: SoftLabels | None = None

    @property
    def num_prefixes(self) -> int:
        """Prefixes that the packing's prefix index counts through; 1 where there is no such index."""
        return 1 if self.packing is None or self.packing.prefix_index is None else 1 + max(self.packing.prefix_index)

    @property
    def num_targets(self) -> int:
        """Targets in the batch."""
        return int(self.target_index[-1]) + 1

    @property
    def width(self) -> int:
        """Positions of a row of logits."""
        ids = self.input_ids if self.decoder_input_ids is None else self.decoder_input_ids
        return int(ids.shape[1])

    def inputs(self, device: torch.device, **more: Tensor) -> dict[str, Any]:
        """The arguments of `Backbone.forward`, on a device; further tensors go along in the same transfer."""
        names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask", "source_rows")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        hidden = {} if self.hidden is None else {"hidden": self.hidden}
        return {**send({**given, **more}, device), "packing": self.packing, **hidden}


def send(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Tensors on a device; on a GPU in one transfer from pinned memory, for which nothing waits."""
    if device.type != "cuda" or all(tensor.device == device for tensor in tensors.values()):
        return {name: tensor.to(device) for name, tensor in tensors.items()}
    return _as_one(tensors, lambda joined: joined.pin_memory().to(device, non_blocking=True))


def _as_one(
    tensors: Mapping[str, Tensor], move: Callable[[UInt8[Tensor, " N"]], UInt8[Tensor, " N"]]
) -> dict[str, Tensor]:
    """Tensors as views of what `move` makes of the bytes of all."""
    # Those of the largest elements first, so that each begins where its elements may.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    moved = move(torch.cat([tensor.reshape(-1).view(torch.uint8) for _, tensor in ordered]))
    pieces = moved.split([tensor.nbytes for _, tensor in ordered])
    return {name: piece.view(like.dtype).view(like.shape) for (name, like), piece in zip(ordered, pieces, strict=True)}
