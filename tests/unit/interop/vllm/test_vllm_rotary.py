"""Rotary frequencies by the configuration are those that a model is found to have by running it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from prefixtune.interop.vllm.rotary import differing_layer, layer_frequencies

Make = Callable[..., Any]

PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
SETTINGS = {
    "default": PLAIN,
    "theta": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


def frequencies_of(backbone: Any, **changes: Any) -> Any:
    config = copy.deepcopy(backbone.model.config.get_text_config(decoder=True))
    for name, value in changes.items():
        setattr(config, name, value)
    shapes = backbone.geometry["decoder"]
    return layer_frequencies(config, shapes[0].key_dim, len(shapes))


@pytest.mark.parametrize("kind", SETTINGS)
def test_every_kind_of_scaling(kind: str, tiny_backbone: Make):
    backbone = tiny_backbone("llama", rope_parameters=SETTINGS[kind], max_position_embeddings=512)
    header = backbone.rotation.to_header()
    assert None not in frequencies_of(backbone)
    for other, settings in SETTINGS.items():
        layer = differing_layer(header, frequencies_of(backbone, rope_parameters=settings))
        assert layer == (None if other == kind else 0), other


@pytest.mark.parametrize("name", ["phi", "gpt_neox", "glm4", "gemma3_text", "olmo3", "smollm3", "gpt_oss"])
def test_families_with_partial_or_mixed_rotation(name: str, tiny_backbone: Make):
    backbone = tiny_backbone(name)
    frequencies = frequencies_of(backbone)
    assert any(frequencies)
    assert differing_layer(backbone.rotation.to_header(), frequencies) is None
    doubled = [one and tuple(2 * frequency for frequency in one) for one in frequencies]
    assert differing_layer(backbone.rotation.to_header(), doubled) is not None


@pytest.mark.parametrize("name", ["gpt2", "deepseek_v3"])
def test_what_a_configuration_does_not_say_is_not_compared(name: str, tiny_backbone: Make):
    assert not any(frequencies_of(tiny_backbone(name)))


@pytest.mark.parametrize("stored", [None, {}, {"positions": "rotary"}, {"positions": "none"}])
def test_a_header_without_a_rotation_is_not_compared(stored: Any):
    assert differing_layer(stored, [(1.0, 0.1)]) is None


@pytest.mark.parametrize(
    "settings",
    [{}, {"rope_theta": None}, {**PLAIN, "rope_type": "longrope"}, {**PLAIN, "rope_type": "linear"}],
)
def test_settings_that_are_incomplete_or_unknown(settings: dict[str, Any]):
    assert layer_frequencies(SimpleNamespace(rope_parameters=settings), 8, 2) == [None, None]
