"""Relative bias."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.attention.forward import forward_with_backend
from prefixtune.attention.kernels import ScoreOptions
from prefixtune.attention.layout import Layout, main_device
from prefixtune.prefix.geometry import Site

__all__ = ["relative_bias"]


def relative_bias(
    model: Any, layout: Layout, length: int, encoded: Float[Tensor, "1 S E"]
) -> dict[int, Float[Tensor, "Hq N"]]:
    """What an encoder-decoder's decoder adds to scores at each distance, from 0 on: by layer, where it adds anything.

    Found by running a row of so many tokens; beyond `relative_attention_max_distance`, where the model's settings name
    one, all distances are alike, so that the row need be no longer.
    """
    farthest = getattr(model.config, "relative_attention_max_distance", None)
    count = length if farthest is None else min(length, farthest + 1)
    noted = BiasRecorder()
    # A row of one token tells whether there is any; where there is none, positions may be few.
    for tokens in (1, count):
        ids = torch.zeros(1, tokens, dtype=torch.long, device=main_device(model))
        forward_with_backend(model, layout, ids, torch.arange(tokens, device=ids.device)[None], noted, None, encoded)
        if not noted.found:
            break
    return noted.found


class BiasRecorder:
    """Notes position biases as the last token of a row sees them, in place of attending."""

    def __init__(self) -> None:
        self.found: dict[int, Float[Tensor, "Hq N"]] = {}

    def attend(
        self,
        place: tuple[Site, int],
        query: Float[Tensor, "1 Hq T Dk"],
        key: Float[Tensor, "1 H S Dk"],
        value: Float[Tensor, "1 H S Dv"],
        special: ScoreOptions,
        window: int | None,
    ) -> Float[Tensor, "1 T Hq Dv"]:
        """Note the bias; what is returned has the right shape only."""
        if place[0] == "decoder" and special.position_bias is not None:
            self.found[place[1]] = special.position_bias[0, :, -1].flip(-1)
        return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
