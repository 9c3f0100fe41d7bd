"""Prefixes of random numbers."""

import torch

from prefixtune.prefix.prefix import Prefix


def random_prefix(backbone, length, seed=0, scale=1.0, header=None):
    """A prefix for a backbone, whose tensors are leaves that take gradients.

    Its length may also be given by site, as in `{"encoder": 3, "cross": 5}`: then it stands at these sites only.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = dict.fromkeys(backbone.geometry, length) if isinstance(length, int) else length

    def one(heads, positions, size):
        return (torch.randn(heads, positions, size, generator=generator) * scale).requires_grad_()

    layers = {
        site: tuple(
            (one(s.num_kv_heads, positions, s.key_dim), one(s.num_kv_heads, positions, s.value_dim))
            for s in backbone.geometry[site]
        )
        for site, positions in lengths.items()
    }
    return Prefix(layers, header or {})
