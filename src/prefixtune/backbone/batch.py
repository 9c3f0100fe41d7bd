"""One batch: its tokens, its labels, and where these are predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefixtune.attention.packing import Packing
from prefixtune.backbone.soft_labels import SoftLabels

__all__ = ["Batch"]


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
        visible_lengths: The first positions of the prefix that are in front: one number for all rows, or as many as the
            packing's prefix index counts through; empty: the whole prefix is in front of all.
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
    visible_lengths: tuple[int | None, ...] = ()
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

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """The arguments of `Backbone.forward`, on a device."""
        names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask", "source_rows")
        given = {name: getattr(self, name) for name in names}
        tensors = {name: value.to(device) for name, value in given.items() if value is not None}
        return {**tensors, "packing": self.packing, **({} if self.hidden is None else {"hidden": self.hidden})}

    def weights(self, reduction: str, num_targets: int, num_tokens: int) -> Float[Tensor, " N"]:
        """Each label's weight in the loss.

        Args:
            reduction: `sentence`: a target's losses are summed, and targets averaged; `token`: tokens are averaged.
            num_targets: Targets of the whole optimizer step.
            num_tokens: Labels of the whole optimizer step.
        """
        total = num_targets if reduction == "sentence" else num_tokens
        return torch.full((len(self.labels),), 1.0 / total)
