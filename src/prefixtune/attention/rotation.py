"""Find out, by running a few tokens at several positions, how each layer's keys turn with position.

The same row of tokens is run at many offsets. In a model whose positions enter through its attention alone, hidden
states do not change with the offset; so every layer's keys at offset n are those at offset 0, turned (or unchanged, in
a layer without positions). Which numbers turn together and how fast is read from the keys: half-split and interleaved
pairs, partial rotary, scaled frequencies and frequencies by layer need no name in a configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prefixtune.attention.injection import Injection, injecting_beside
from prefixtune.attention.layout import Layout, main_device
from prefixtune.errors import BackboneError, first_line
from prefixtune.prefix.rotation import PairTurns, Rotation, length_dependent_turn

__all__ = ["find_rotation"]

_TOKENS = 8
_FARTHEST = 4096
"""Largest offset that is tried; a frequency's error is about the precision of a key, divided by it."""
_TOLERANCE = {torch.bfloat16: 0.03, torch.float16: 0.006}
"""How far a number of the first layer's keys may be from the turned one, relative to its size, by dtype."""
_FLOAT32_TOLERANCE = 0.002
_SEEN = 0.002
"""Times that: how far a number has to change at some offset to be looked at."""
_CERTAIN = 0.25
"""Times the tolerance: a change that no rounding explains, so that the number has to be in a pair."""
_SMALLEST = 0.1
"""Times the median over a key's numbers: smaller ones are compared at this size, below which rounding counts."""
_DEEPER = 6.0
"""Times the tolerance: how far later layers may be, where rounding adds up."""
_NOISE = 2.0
"""Times what values change by, which do not turn: what rounding may do to keys."""
_MOST_NOISE = 0.5
"""How far later layers may be at most, where such rounding is seen in the values too; what does not turn is further."""


@dataclass(frozen=True)
class _Sample:
    """One layer's keys, or values, at every offset: (N offsets, H, T, D) in float64, the first at offset 0."""

    keys: Float[Tensor, "N H T D"]
    values: Float[Tensor, "N H T Dv"]


@torch.no_grad()
def find_rotation(model: Any, layout: Layout, max_positions: int | None) -> Rotation:
    """How the keys of a model's layers turn with position.

    Encoders and encoder-decoders do not shift their text's positions: a prefix stays where it is, and nothing turns.

    Args:
        model: The frozen model, probed before.
        layout: What `probe` found.
        max_positions: How many positions the model was made for; None: any number.

    Raises:
        BackboneError: Keys depend on the text's length, or on position in a way that is no turn.
    """
    if layout.kind != "decoder":
        return Rotation("none")
    name = f"{type(model).__name__} (model type {getattr(model.config, 'model_type', '?')!r})"
    _refuse_length_dependent(model.config, name)
    offsets = _offsets(max_positions)
    try:
        samples = _run_at(model, layout, offsets)
    except Exception as failure:
        raise BackboneError(
            f"{name} does not run at several positions: {first_line(failure)}",
            hint="its prefixes can be used alone, but not joined.",
        ) from failure
    tolerance = _TOLERANCE.get(model.dtype, _FLOAT32_TOLERANCE)
    kinds: list[PairTurns] = []
    turns: list[PairTurns | None] = []
    for index, sample in enumerate(samples):
        allowed = tolerance if index == 0 else _DEEPER * tolerance
        noise = 0.0 if index == 0 else _NOISE * _turn_error(sample.values, offsets, None)
        if _distance(sample.values, sample.values[:1].expand_as(sample.values)) > allowed:
            if index == 0:
                # Positions are added to the input.
                return Rotation("absolute", max_positions=max_positions)
            raise BackboneError(
                f"what the layers of {name} compute depends on where a text stands, not on distances alone (seen at "
                f"layer {index}), so that its prefixes cannot be moved to other positions.",
                hint="its prefixes can be used alone; join prefixes of another backbone.",
            )
        turn, error = _choose(sample.keys, offsets, kinds, tolerance, noise)
        if error > max(allowed, min(noise, _MOST_NOISE)):
            raise BackboneError(
                f"the keys of {name} change with position in a way that is no rotation (layer {index}, relative "
                f"difference {error:.1e}), so that a prefix cannot be moved.",
                hint="prefixes of this model can be used alone, but not joined.",
            )
        turns.append(turn)
        if turn is not None and turn not in kinds:
            kinds.append(turn)
    if not kinds:
        return Rotation("none", max_positions=max_positions)
    return Rotation("rotary", {"decoder": tuple(turns)}, max_positions)


def _refuse_length_dependent(config: Any, name: str) -> None:
    """Refuse rotary scaling that changes with the length of the text.

    Raises:
        BackboneError: The configuration names it.
    """
    kind = length_dependent_turn(config.get_text_config(decoder=True))
    if kind is not None:
        raise BackboneError(
            f"the rotary frequencies of {name} depend on the length of the text (rope_type {kind!r}), so that its "
            "prefixes cannot be moved to other positions.",
            hint="its prefixes can be used alone; join prefixes of a backbone with fixed frequencies.",
        )


def _offsets(max_positions: int | None) -> list[int]:
    """Offsets from 0 on: powers of two, which resolve ever smaller frequencies, and some between them."""
    most = min(max_positions or _FARTHEST, _FARTHEST) - _TOKENS
    powers = [2**n for n in range(most.bit_length()) if 2**n <= most] if most > 0 else []
    between = [most * n // 13 for n in range(5, 14)] if most > 0 else []
    return sorted({0, *powers, *between})


def _run_at(model: Any, layout: Layout, offsets: Sequence[int]) -> list[_Sample]:
    """Every decoder layer's keys and values of one row of tokens at every offset."""
    device = main_device(model)
    size = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(size, (1, _TOKENS), generator=generator).to(device)
    ids = row.expand(len(offsets), -1)
    positions: Int[Tensor, "N T"] = torch.arange(_TOKENS)[None] + torch.tensor(offsets)[:, None]
    recorded: list[tuple[nn.Module, Tensor, Tensor]] = []
    injection = Injection(layout.layer_of, recorded_kv=recorded)
    with injecting_beside(layout, injection):
        # Without the output head: its scores are not looked at, and take the most memory.
        model.base_model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=positions.to(device),
            use_cache=False,
            prefix_injection=injection,
        )
    by_layer: dict[int, _Sample] = {}
    for module, key, value in recorded:
        layer = layout.layer_of.get(module)
        if layer is not None and layer[1] not in by_layer:
            by_layer[layer[1]] = _Sample(key.cpu().double(), value.cpu().double())
    return [by_layer[index] for index in range(len(layout.geometry["decoder"]))]


def _choose(
    keys: Float[Tensor, "N H T D"],
    offsets: Sequence[int],
    known: Sequence[PairTurns],
    tolerance: float,
    noise: float,
) -> tuple[PairTurns | None, float]:
    """How one layer's keys turn (as in an earlier layer, where that fits), and how far the keys are from that."""
    size = keys.shape[-1]
    fitting = [None, *(turn for turn in known if max(*turn.first, *turn.second) < size)]
    errors = [(_turn_error(keys, offsets, turn), turn) for turn in fitting]
    error, best = min(errors, key=lambda pair: pair[0])
    if error <= tolerance and best is not None:
        return best, error
    fitted = _fit(keys, offsets, tolerance, max(_CERTAIN * tolerance, noise))
    new_error = _turn_error(keys, offsets, fitted)
    return (fitted, new_error) if 2 * new_error < error else (best, error)


def _turn_error(keys: Float[Tensor, "N H T D"], offsets: Sequence[int], turn: PairTurns | None) -> float:
    """How far keys are from turned ones: of the worst number at the worst offset, relative to the number's size.

    Each number counts by itself: one very large number, which some models have, would hide the others. Of the tokens
    the median, since some may take another expert at another offset.
    """
    if keys.shape[0] < 2:
        return 0.0
    expected = keys[:1] if turn is None else torch.stack([turn(keys[0].float(), n).double() for n in offsets])
    difference = (keys - expected)[1:].square().sum(1).sqrt()  # (N - 1, T, D), over heads
    size = keys.square().sum(1).mean(0).sqrt()  # (T, D)
    size = torch.maximum(size, _SMALLEST * size.median(dim=-1, keepdim=True).values).clamp(min=1e-30)
    return float((difference / size).median(dim=1).values.max())


def _distance(one: Float[Tensor, "N H T D"], other: Float[Tensor, "N H T D"]) -> float:
    """Median over offsets and tokens of the relative difference: single tokens may take another expert."""
    if one.shape[0] < 2:
        return 0.0
    difference = (one - other)[1:].transpose(1, 2).flatten(2).norm(dim=-1)
    return float((difference / other[1:].transpose(1, 2).flatten(2).norm(dim=-1).clamp(min=1e-30)).median())


# --- pairs and frequencies -------------------------------------------------------------------------------------------


def _fit(keys: Float[Tensor, "N H T D"], offsets: Sequence[int], tolerance: float, certain: float) -> PairTurns | None:
    """The pairs of numbers that turn together, and their frequencies.

    None: nothing turns, or a number that changes by more than `certain`, relative to its size, is in no pair.
    """
    samples = keys.flatten(1, 2)
    start, moved = samples[0], samples[1:]
    energy = start.square().sum(0).clamp(min=1e-30)
    change = (moved - start).square().sum(1).amax(0) / energy
    # What changes less than its precision shows cannot be seen to turn.
    turning = torch.nonzero(change > (_SEEN * tolerance) ** 2).flatten().tolist()
    if not turning:
        return None
    chosen = torch.tensor(turning)
    partner = _partners(start[:, chosen], moved[:, :, chosen])
    pairs = [(i, j) for i, j in enumerate(partner.tolist()) if i < j and int(partner[j]) == i]
    needed = torch.nonzero(change[chosen] > certain**2).flatten().tolist()
    if not pairs or not {index for pair in pairs for index in pair}.issuperset(needed):
        return None
    first, second = (torch.tensor(side) for side in zip(*pairs, strict=True))
    frequencies = _frequencies(start[:, chosen], moved[:, :, chosen], first, second, offsets[1:])
    rounded = [float(f"{x:.9g}") for x in frequencies.tolist()]
    return PairTurns(tuple(chosen[first].tolist()), tuple(chosen[second].tolist()), tuple(rounded))


def _partners(start: Float[Tensor, "S C"], moved: Float[Tensor, "N S C"]) -> Int[Tensor, " C"]:
    """For each number the one that it turns with: one angle for each offset has to explain both.

    What is left unexplained counts relative to each number's own size, so that no large number explains a small one.
    """
    cross = moved.transpose(1, 2) @ start  # (N, C, C): of moved i with start j
    gram = start.T @ start
    before, after = start.square().sum(0), moved.square().sum(1)
    own = torch.diagonal(cross, dim1=1, dim2=2)
    cos, sin = own[:, :, None] + own[:, None, :], cross.transpose(1, 2) - cross
    length = (cos.square() + sin.square()).sqrt().clamp(min=1e-30)
    cos, sin = cos / length, sin / length
    # |moved i - (cos start i - sin start j)|^2
    left = after[:, :, None] + cos.square() * before[:, None] + sin.square() * before
    left = left - 2 * cos * own[:, :, None] + 2 * sin * cross - 2 * cos * sin * gram
    relative = left.clamp(min=0).sum(0) / after.sum(0).clamp(min=1e-30)[:, None]
    return (relative + relative.T).fill_diagonal_(float("inf")).argmin(dim=1)


def _frequencies(
    start: Float[Tensor, "S C"],
    moved: Float[Tensor, "N S C"],
    first: Int[Tensor, " K"],
    second: Int[Tensor, " K"],
    offsets: Sequence[int],
) -> Float[Tensor, " K"]:
    """Radians per position of each pair, from angles at growing offsets, each unwrapped by the frequency so far."""
    x = torch.complex(start[:, first], start[:, second])
    y = torch.complex(moved[:, :, first], moved[:, :, second])
    angles = (y * x.conj()).sum(1).angle()
    frequency = torch.zeros(len(first), dtype=torch.float64)
    weighted, weights = torch.zeros_like(frequency), 0.0
    for angle, offset in zip(angles, offsets, strict=True):
        turns = ((frequency * offset - angle) / (2 * torch.pi)).round()
        weighted, weights = weighted + (angle + 2 * torch.pi * turns) * offset, weights + offset * offset
        frequency = weighted / weights
    return frequency
