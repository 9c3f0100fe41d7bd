"""What is trained: a table or an MLP, where each starts, and the size of its steps."""

import pytest
import torch

from prefixtune.prefix.encoder import PrefixEncoder, step_sizes
from prefixtune.prefix.geometry import LayerShape
from prefixtune.prefix.prefix import Prefix, flatten, unflatten

GEOMETRY = {"decoder": (LayerShape(2, 4, 4), LayerShape(1, 8, 6))}


def module(kind, start=None):
    torch.manual_seed(0)
    return PrefixEncoder(kind, GEOMETRY, 5, embedding_size=12, bottleneck_size=7, start=start)


def test_the_mlp_is_the_papers():
    made = module("mlp")
    site = made.sites["decoder"]
    expected = site.output(torch.tanh(site.hidden(site.embedding(torch.arange(5)))))
    assert torch.equal(flatten(made().layers["decoder"]), expected)


@pytest.mark.parametrize("kind", ["none", "scaled"])
def test_a_given_start_is_where_training_begins(kind):
    shapes = GEOMETRY["decoder"]
    start = Prefix({"decoder": unflatten(torch.randn(5, sum(shape.size for shape in shapes)), shapes)})
    assert module(kind, start).bake().equal(start)


def test_steps_are_of_the_starts_size_without_where_texts_begin():
    key, value = torch.ones(2, 5, 4), 3 * torch.ones(2, 5, 4)
    key[:, 0] = key[:, 3] = 100
    sizes = step_sizes((LayerShape(2, 4, 4),), [(key, value)], 2.0, sinks=(0, 3))
    assert sizes.tolist() == [1.0] * 8 + [6.0] * 8
    assert step_sizes((LayerShape(2, 4, 4),), [(key[:, :1], value[:, :1])], 1.0)[0] == 100


def test_what_starts_at_zero_takes_the_other_layers_steps():
    shapes = (LayerShape(1, 2, 2),) * 4
    sizes = (0.0, 2.0, 3.0, 5.0)
    layers = [(torch.full((1, 3, 2), size), torch.full((1, 3, 2), 2 * size)) for size in sizes]
    assert step_sizes(shapes, layers, 1.0).tolist() == [3, 3, 6, 6, 2, 2, 4, 4, 3, 3, 6, 6, 5, 5, 10, 10]
    nothing = [(torch.zeros(1, 3, 2), torch.zeros(1, 3, 2))] * 4
    assert float(step_sizes(shapes, nothing, 4.0).min()) > 0
