"""A short text that identifies a backbone, in any dtype.

A fingerprint is `HASH:SAMPLES`: a hash of facts about the model, and 256 of its weights as bfloat16.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_SAMPLES = 256
_SLACK = 0.15
"""Sampled weights that may differ in the last bfloat16 bit: rounding through float16 moves about one in sixteen."""
_FLOAT16_STEP = 2.0**-24
"""Between neighbours among float16's smallest numbers, where bfloat16 has many more in between."""


def sample_weights(sizes: Sequence[tuple[str, int]], take: Callable[[str, int], Tensor]) -> str:
    """Sample a model's weights for its fingerprint.

    Args:
        sizes: Name and number of elements of every parameter, tied ones once.
        take: (name, index in the flattened parameter) -> that weight.

    Returns:
        Base64 of 256 bfloat16 numbers spread over all parameters; with a LoRA adapter, half of them over
        the adapter's.
    """
    ordered = sorted(sizes)
    # An adapter's few and small tensors get half of the samples.
    pools = [pool for pool in (ordered, [entry for entry in ordered if "lora_" in entry[0]]) if pool]
    picked = []
    for index in range(_SAMPLES):
        pool = pools[index % len(pools)]
        name, size = pool[index * len(pool) // _SAMPLES if len(pool) > _SAMPLES else index // len(pools) % len(pool)]
        # Golden-ratio steps spread the samples over each tensor.
        picked.append(take(name, int((index * 0.6180339887498949 % 1.0) * size)))
    samples = torch.stack([value.detach().float().cpu() for value in picked]).to(torch.bfloat16).view(torch.int16)
    return base64.b64encode(samples.numpy().astype("<i2").tobytes()).decode()


@functools.lru_cache(maxsize=1024)
def fingerprints_match(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same model: same shape, and weights equal up to rounding.

    Rounding through another dtype may move a weight by one unit of bfloat16's last bit; more, or more than 15 % of
    the samples moving, means another model (fine-tuned ones included). Weights that float16 does not tell apart, which
    are below 2^-16 (1.5e-5), have not moved.
    """
    if one == other:
        return True
    (shape, first), (other_shape, second) = _parse(one), _parse(other)
    if shape != other_shape or first.shape != second.shape or first.numel() == 0:
        return False
    # bfloat16 bits of one sign are ordered like the numbers themselves.
    steps = (first - second).abs()
    numbers, others = (bits.to(torch.int16).view(torch.bfloat16).float() for bits in (first, second))
    steps[(numbers - others).abs() <= _FLOAT16_STEP] = 0
    return bool((steps <= 1).all() and (steps > 0).float().mean() <= _SLACK)


def _parse(text: str) -> tuple[str, torch.Tensor]:
    """A fingerprint's hash and its samples' bits; no samples where the text is no fingerprint."""
    shape, _, samples = text.partition(":")
    try:
        bits = base64.b64decode(samples, validate=True)
        return shape, torch.frombuffer(bytearray(bits), dtype=torch.int16).int()
    except ValueError:
        return shape, torch.empty(0, dtype=torch.int32)
