"""Keys that turn, and a rotation as a header keeps it."""

import pytest
import torch

from prefixtune.errors import CheckpointError
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.rotation import PairTurns, Rotation

HALF = PairTurns((0, 1), (2, 3), (1.0, 0.01))
ROTATION = Rotation("rotary", {"decoder": (HALF, None)}, 100)


TURNS = {"first": [0], "second": [1], "frequencies": [1.0]}


def _prefix(length, layers=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(length)
    return Prefix(
        {
            "decoder": tuple(
                (torch.randn(2, length, 5, generator=generator).to(dtype), torch.randn(2, length, 5).to(dtype))
                for _ in range(layers)
            )
        }
    )


def test_a_rotation_is_checked_against_a_prefix_before_anything_is_turned():
    ROTATION.check(_prefix(3).geometry)
    Rotation("none").check(_prefix(3).geometry)
    with pytest.raises(CheckpointError):
        ROTATION.check(_prefix(3, layers=3).geometry)
    wide = Rotation("rotary", {"decoder": (PairTurns((0,), (5,), (1.0,)), None)})
    with pytest.raises(CheckpointError):
        wide.check(_prefix(3).geometry)


@pytest.mark.parametrize(
    "value",
    [
        {"positions": "spiral"},
        {"positions": "rotary", "layers": {"decoder": [None, None]}},
        {"positions": "none", "layers": {"decoder": [0]}, "turns": [TURNS]},
        {"positions": "rotary", "turns": [{"first": [0], "second": [0], "frequencies": [1.0]}]},
        {"positions": "rotary", "turns": [{"first": [0], "second": [10**9], "frequencies": [1.0]}]},
        {"positions": "rotary", "turns": [{"first": [0], "second": [1], "frequencies": [1e9]}]},
        {"positions": "rotary", "layers": {"decoder": [None] * 5000}},
    ],
)
def test_a_header_that_was_made_up_is_refused_in_words(value):
    with pytest.raises(CheckpointError):
        Rotation.from_header(value)
