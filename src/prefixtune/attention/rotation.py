"""Find out how each layer's keys turn with position: read from the model, and verified by running a few tokens.

Rotary models keep the frequencies of their pairs. Which numbers of a key are a pair (half-split or interleaved, the
whole head or a part of it) is not written anywhere, and layers may differ. So the same row of tokens is run at several
offsets. In a model whose positions enter through its attention alone, hidden states do not change with the offset.
Every layer's keys at offset n must then be those at offset 0, turned in one of the ways possible, or unchanged.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefixtune.attention.layout import Layout, main_device
from prefixtune.attention.record import record_kv
from prefixtune.errors import BackboneError, first_line
from prefixtune.prefix.rotation import PairTurns, Rotation, length_dependent_turn

_TOKENS = 8
_FARTHEST = 4096
"""Largest offset that is tried."""
_TOLERANCE = {torch.bfloat16: 0.03, torch.float16: 0.006}
"""How far the first layer's keys may be from the turned ones, relative to their size, by dtype."""
_FLOAT32_TOLERANCE = 0.002
_DEEPER = 6.0
"""Times the tolerance: how far later layers may be, where rounding adds up."""


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

    def refusal(why: str) -> BackboneError:
        name = f"{type(model).__name__} (model type {getattr(model.config, 'model_type', '?')!r})"
        hint = "its prefixes can be used alone, but not joined."
        return BackboneError(f"prefixes of {name} cannot be moved to other positions: {why}.", hint=hint)

    kind = length_dependent_turn(model.config.get_text_config(decoder=True))
    if kind is not None:
        raise refusal(f"its rotary frequencies depend on the length of the text (rope_type {kind!r})")
    most = max(0, min(max_positions or _FARTHEST, _FARTHEST) - _TOKENS)
    offsets = sorted({0, min(1, most), most // 9, most // 2, most})
    try:
        samples = _run_at(model, layout, offsets)
    except Exception as failure:
        raise refusal(f"it does not run at several ones: {first_line(failure)}") from failure
    tolerance = _TOLERANCE.get(model.dtype, _FLOAT32_TOLERANCE)
    turns: list[PairTurns | None] = []
    for index, (keys, values) in enumerate(samples):
        allowed = tolerance if index == 0 else _DEEPER * tolerance
        if _distance(values, values[:1]) > allowed:
            if index == 0:
                # Positions are added to the input.
                return Rotation("absolute", max_positions=max_positions)
            raise refusal(f"what layer {index} computes depends on where a text stands, not on distances alone")
        ways: list[PairTurns | None] = [None, *_possible_turns(model, keys.shape[-1])]
        errors = [_distance(keys, _turned(keys[:1], offsets, turn)) for turn in ways]
        error = min(errors)
        if error > allowed:
            raise refusal(f"keys change in a way that is no rotation (layer {index}, relative difference {error:.1e})")
        turns.append(ways[errors.index(error)])
    if not any(turns):
        return Rotation("none", max_positions=max_positions)
    return Rotation("rotary", {"decoder": tuple(turns)}, max_positions)


def _run_at(
    model: Any, layout: Layout, offsets: Sequence[int]
) -> list[tuple[Float[Tensor, "N H T D"], Float[Tensor, "N H T Dv"]]]:
    """Every layer's keys and values of one row of tokens at every offset, in float64."""
    size = model.get_input_embeddings().weight.shape[0]
    row = torch.randint(size, (1, _TOKENS), generator=torch.Generator().manual_seed(0)).to(main_device(model))
    ids = row.expand(len(offsets), -1)
    positions: Int[Tensor, "N T"] = torch.arange(_TOKENS)[None] + torch.tensor(offsets)[:, None]
    # Without the output head: its scores are not looked at, and take the most memory.
    kv = record_kv(
        model.base_model,
        layout,
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=positions.to(ids.device),
    )
    layers = (kv["decoder", index] for index in range(len(layout.geometry["decoder"])))
    return [(key.cpu().double(), value.cpu().double()) for key, value in layers]


def _possible_turns(model: Any, size: int) -> Iterator[PairTurns]:
    """Ways in which keys of a size may turn, by the frequencies that the model keeps."""
    found: set[tuple[float, ...]] = set()
    for name, buffer in model.named_buffers():
        if name.endswith("embed_positions"):
            # A table of sines and cosines (GPT-J): at position 1, the sines of the frequencies.
            buffer = buffer[1, : buffer.shape[1] // 2].double().asin()
        elif not name.endswith("inv_freq") or name.endswith("original_inv_freq"):
            continue
        found.add(tuple(float(f"{frequency:.9g}") for frequency in buffer.double().tolist()))
    for frequencies in found:
        pairs = len(frequencies)
        for begin in {0, size - 2 * pairs} if 2 * pairs <= size else ():
            half = [(begin + n, begin + pairs + n) for n in range(pairs)]
            interleaved = [(begin + 2 * n, begin + 2 * n + 1) for n in range(pairs)]
            for way, sign in itertools.product((half, interleaved), (1, -1)):
                turning = [(*pair, sign * speed) for pair, speed in zip(way, frequencies, strict=True) if speed]
                if turning:
                    yield PairTurns(*zip(*turning, strict=True))


def _turned(keys: Float[Tensor, "1 H T D"], offsets: Sequence[int], turn: PairTurns | None) -> Tensor:
    return keys if turn is None else torch.cat([turn(keys.float(), n).double() for n in offsets])


def _distance(found: Float[Tensor, "N H T D"], expected: Float[Tensor, "_N H T D"]) -> float:
    """How far keys or values are from what is expected, relative to their size, at the worst offset.

    Of the tokens the median, since some may take another expert at another offset.
    """
    difference, size = ((tensor.transpose(1, 2).flatten(2).norm(dim=-1)) for tensor in (found - expected, found))
    return float((difference / size.clamp(min=1e-30)).median(dim=1).values.max())
