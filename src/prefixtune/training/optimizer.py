"""What moves the trained numbers: AdamW, or Muon for those of a prefix.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) makes of each matrix's momentum the nearest matrix whose
singular values are all alike, so that a step goes as far in the directions that gradients seldom name as in the usual
ones. The matrices of a prefix are the keys and the values of each layer, (P, KV heads x head size).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.prefix.encoder import PrefixEncoder, PromptEncoder
from prefixtune.training.config import ADAMW_PER_MUON, TrainConfig

__all__ = ["Muon", "make_optimizers", "orthogonalize"]


_ROUNDS = 5
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""The polynomial of a round; these coefficients bring small singular values up quickly (Jordan et al. 2024)."""
_TINY = 1e-12


def orthogonalize(matrices: Float[Tensor, "*B M N"]) -> Float[Tensor, "*B M N"]:
    """Nearly the nearest matrices whose singular values are all 1: they come out between 0.7 and 1.2.

    Five Newton-Schulz rounds, which need matrix products alone. A matrix of zeros stays one.
    """
    a, b, c = _NEWTON_SCHULZ
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    made: Tensor = matrices.mT if is_tall else matrices
    made = made / made.norm(dim=(-2, -1), keepdim=True).clamp(min=_TINY)
    for _ in range(_ROUNDS):
        gram = made @ made.mT
        made = a * made + (b * gram + c * gram @ gram) @ made
    return made.mT if is_tall else made


class Muon(torch.optim.Optimizer):
    """Momentum with look-ahead, orthogonalized matrix by matrix; the root mean square of a matrix's step is the rate.

    torch's own Muon takes whole parameters as matrices and has another size of a step; a prefix keeps all layers' keys
    and values side by side in one.

    Args:
        widths: Each parameter, two-dimensional, and the widths of the matrices that stand side by side in it.
        lr: The rate.
        momentum: How much of the earlier gradients stays.
        weight_decay: The share, times the rate, that the numbers shrink by in a step.
    """

    def __init__(
        self,
        widths: Mapping[Tensor, Sequence[int]],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(list(widths), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.widths = dict(widths)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Move the parameters against their gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                moment = state["momentum"].mul_(group["momentum"]).add_(parameter.grad)
                ahead = parameter.grad.add(moment, alpha=group["momentum"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(_directions(ahead, self.widths[parameter]), alpha=group["lr"])


def _directions(ahead: Float[Tensor, "P S"], widths: Sequence[int]) -> Float[Tensor, "P S"]:
    """The orthogonalized matrices, each with a root mean square of 1; those of one width are computed together."""
    parts = list(ahead.split(list(widths), dim=1))
    for width in set(widths):
        places = [index for index, own in enumerate(widths) if own == width]
        made = orthogonalize(torch.stack([parts[index] for index in places]))
        made = made / made.square().mean(dim=(-2, -1), keepdim=True).sqrt().clamp(min=_TINY)
        for index, matrix in zip(places, made, strict=True):
            parts[index] = matrix
    return torch.cat(parts, dim=1)


def make_optimizers(
    config: TrainConfig, encoder: PrefixEncoder | PromptEncoder | None, weights: Iterable[Tensor]
) -> list[torch.optim.Optimizer]:
    """The optimizers of a run: one, or Muon for a prefix and AdamW for what trains beside it.

    Args:
        config: The run.
        encoder: The trainable prefix; None: none.
        weights: The backbone's own that train.

    Returns:
        AdamW beside Muon has groups with `per_rate`, how much larger their rate is than the run's.
    """
    rate, decay = config.peak_learning_rate, config.weight_decay
    matrices = encoder.matrices() if config.optimizer == "muon" and encoder is not None else {}
    made: list[torch.optim.Optimizer] = [Muon(matrices, rate, weight_decay=decay)] if matrices else []
    trained = [*(() if encoder is None else encoder.parameters()), *weights]
    if rest := [parameter for parameter in trained if parameter not in matrices]:
        group = {"params": rest, **({"per_rate": ADAMW_PER_MUON} if matrices else {})}
        # One pass over the parameters, where torch's default takes ten; on a GPU it has a quick way of its own.
        fused = all(parameter.device.type == "cpu" for parameter in rest) or None
        made.append(torch.optim.AdamW([group], lr=rate, weight_decay=decay, fused=fused))
    return made
