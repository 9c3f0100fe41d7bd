"""A model without its weights is described by one of its layers, so all of them must attend alike."""

import pytest

from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.shapes import load_shapes
from prefixtune.errors import BackboneError


@pytest.fixture
def stored(tiny_models, tiny_tokenizer, tmp_path):
    def store(family):
        tiny_models(family).save_pretrained(tmp_path / family)
        tiny_tokenizer.save_pretrained(tmp_path / family)
        return str(tmp_path / family)

    return store


@pytest.mark.parametrize("family", ["llama"])
def test_shapes_are_those_of_the_loaded_model(stored, family):
    found, wanted = load_shapes(stored(family)), load_backbone(stored(family), dtype="float32", device="cpu")
    assert found.fingerprint == wanted.fingerprint
    assert found.geometry == wanted.geometry
    assert found.rotation == wanted.rotation


@pytest.mark.parametrize("family", ["smollm3"])
def test_layers_that_attend_in_two_ways_are_refused(stored, family):
    with pytest.raises(BackboneError):
        load_shapes(stored(family))
