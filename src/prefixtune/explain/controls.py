"""Prefixes to compare with: what a view shows of these is no sign of training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prefixtune.prefix.prefix import Prefix

__all__ = ["make_controls", "random_like", "shuffled", "with_layers"]


def make_controls(prefix: Prefix, against: Prefix | None, seed: int) -> dict[str, Prefix]:
    """Prefixes to compare with, by name: `random`, `shuffled` (from two positions on), `other` (if one is given)."""
    controls = {"random": random_like(prefix, seed)}
    if (moved := shuffled(prefix, seed)) is not None:
        controls["shuffled"] = moved
    if against is not None:
        other = against.to(torch.float32, "cpu")
        controls["other"] = Prefix(other.layers, other.header, prefix.head)
    return controls


def with_layers(prefix: Prefix, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Prefix:
    """The same prefix with each layer's keys and values, both (H, P, D), as `change` returns them."""
    layers = {site: tuple(change(key, value) for key, value in pairs) for site, pairs in prefix.layers.items()}
    return Prefix(layers, prefix.header, prefix.head)


def random_like(prefix: Prefix, seed: int) -> Prefix:
    """Random directions, each head's vector at each layer and position as long as the prefix's own."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor) -> Tensor:
        direction = torch.nn.functional.normalize(torch.randn(tensor.shape, generator=generator), dim=-1)
        drawn: Tensor = direction * torch.linalg.vector_norm(tensor, dim=-1, keepdim=True)
        return drawn

    return with_layers(prefix, lambda key, value: (draw(key), draw(value)))


def shuffled(prefix: Prefix, seed: int) -> Prefix | None:
    """The prefix's own keys, with the values of other positions, in each layer by another permutation.

    To move keys and values together would change nothing: attention sums over positions. None: P is 1 everywhere.
    """
    if prefix.prefix_length < 2:
        return None
    generator = torch.Generator().manual_seed(seed)

    def move(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        count = value.shape[1]
        if count < 2:
            return key, value
        # Around a random circle by one: no position keeps its own value.
        circle = torch.randperm(count, generator=generator)
        permuted = torch.empty_like(value)
        permuted[:, circle] = value[:, circle.roll(1)]
        return key, permuted

    return with_layers(prefix, move)
