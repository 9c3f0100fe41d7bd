"""A model without its weights is described by one of its layers, so all of them must attend alike."""

import pytest

from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.shapes import load_shapes
from prefixtune.errors import BackboneError


def test_shapes_are_those_of_the_loaded_model(save_model, tmp_path):
    folder = str(save_model(tmp_path / "llama"))
    found, wanted = load_shapes(folder), load_backbone(folder, dtype="float32", device="cpu")
    assert found.fingerprint == wanted.fingerprint
    assert found.geometry == wanted.geometry
    assert found.rotation == wanted.rotation
    assert found.max_positions == wanted.max_positions


def test_layers_that_attend_in_two_ways_are_refused(save_model, tmp_path):
    with pytest.raises(BackboneError):
        load_shapes(str(save_model(tmp_path / "smollm3", "smollm3")))
