"""The prefix as a value: shapes, slicing, the flat layout, and what is refused."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixtune.errors import ConfigError
from prefixtune.prefix.geometry import LayerShape
from prefixtune.prefix.prefix import Prefix, flatten, unflatten


def layer(heads=2, length=3, key=4, value=4, start=0.0):
    count = heads * length * key
    keys = torch.arange(count, dtype=torch.float32).view(heads, length, key) + start
    return keys, torch.arange(heads * length * value, dtype=torch.float32).view(heads, length, value) - start


@pytest.fixture
def prefix():
    return Prefix({"decoder": (layer(), layer(start=100), layer(start=200))}, {"task": "toy"})


def test_slicing_keeps_positions_and_header(prefix):
    first = prefix[:2]
    assert first.prefix_length == 2
    assert first.header == prefix.header
    for (key, value), (whole_key, whole_value) in zip(first.layers["decoder"], prefix.layers["decoder"], strict=True):
        assert torch.equal(key, whole_key[:, :2])
        assert torch.equal(value, whole_value[:, :2])
    assert prefix[-1:].equal(prefix[2:3])
    with pytest.raises(ConfigError):
        prefix[3:]
    with pytest.raises(ConfigError) as error:
        # While testing, the annotation would refuse it first.
        inspect.unwrap(Prefix.__getitem__)(prefix, 1)
    assert "prefix[2:3]" in error.value.hint


def test_equal_is_bit_for_bit(prefix):
    other = prefix.detach()
    assert prefix.equal(other)
    other.tensors()[-1][0, 0, 0] += 1e-3
    assert not prefix.equal(other)
    assert not prefix.equal(prefix[:2])
    assert not prefix.equal(Prefix({"encoder": prefix.layers["decoder"]}))
    assert not prefix.equal(Prefix({"decoder": prefix.layers["decoder"][:2]}))


@pytest.mark.parametrize(
    "layers",
    [
        {},
        {"decoder": ()},
        {"middle": (layer(),)},
        {"decoder": ((torch.zeros(2, 3, 4), torch.zeros(2, 4, 4)),)},
        {"decoder": (layer(length=3), layer(length=2))},
    ],
)
def test_what_is_no_prefix_is_refused(layers):
    made = object.__new__(Prefix)
    object.__setattr__(made, "layers", layers)
    with pytest.raises(ConfigError) as error:
        # Not through the constructor: while testing, its annotation would refuse some of these first.
        made.__post_init__()
    assert error.value.hint


shapes = st.lists(
    st.builds(LayerShape, st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4
)


@settings(max_examples=50, deadline=None)
@given(shapes, st.integers(1, 6))
def test_flat_and_back(layer_shapes, length):
    flat = torch.randn(length, sum(shape.size for shape in layer_shapes))
    layers = unflatten(flat, layer_shapes)
    assert Prefix({"decoder": layers}).geometry["decoder"] == tuple(layer_shapes)
    assert torch.equal(flatten(layers), flat)


def test_the_flat_layout_is_layer_then_key_then_head():
    layer_shapes = [LayerShape(2, 3, 3), LayerShape(2, 3, 3)]
    flat = torch.arange(24.0)[None]
    (first_key, first_value), (second_key, _) = unflatten(flat, layer_shapes)
    assert first_key[:, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert first_value[:, 0].tolist() == [[6, 7, 8], [9, 10, 11]]
    assert second_key[:, 0].tolist() == [[12, 13, 14], [15, 16, 17]]
