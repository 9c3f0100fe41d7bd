"""Products of frozen float32 weights by the quicker library."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from prefixtune.backbone import products

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no oneDNN to multiply with"
)


@pytest.fixture(autouse=True)
def gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor where oneDNN is quicker."""
    monkeypatch.setattr(products, "gains", lambda: True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 5), (3, 1, 4)])
def test_products_and_their_gradients_are_those_of_float64(bias: bool, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(*shape, 24, generator=generator, requires_grad=True)
    weight = torch.randn(40, 24, generator=generator)
    offset = torch.randn(40, generator=generator) if bias else None
    exact = inputs.detach().double().requires_grad_()

    found = products.frozen_linear(inputs, weight, offset)
    wanted = F.linear(exact, weight.double(), None if offset is None else offset.double())
    slopes = torch.randn(found.shape, generator=generator)
    (found * slopes).sum().backward()
    (wanted * slopes.double()).sum().backward()

    assert found.shape == wanted.shape
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)
    assert inputs.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(inputs.grad.double(), exact.grad, atol=1e-5, rtol=1e-5)


def test_rows_that_are_not_contiguous_and_transposed_weights() -> None:
    generator = torch.Generator().manual_seed(2)
    inputs, weight = torch.randn(24, 6, generator=generator).t(), torch.randn(24, 40, generator=generator).t()
    torch.testing.assert_close(products.multiply(inputs, weight), inputs @ weight.t())


class Rounded(nn.Parameter):
    """Stands for a quantized weight, which calls itself float32."""


def test_a_weight_that_is_no_plain_tensor_is_left_alone() -> None:
    layer = nn.Linear(8, 12)
    layer.weight = Rounded(layer.weight.detach(), requires_grad=False)
    assert not products.use_products(layer)
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("layer", [nn.Linear(8, 12), nn.Linear(8, 12, bias=False), Conv1D(12, 8)])
def test_frozen_layers_compute_what_they_did(layer: nn.Module) -> None:
    layer.requires_grad_(False)
    inputs = torch.randn(5, 8)
    wanted = layer(inputs)
    assert products.use_products(layer)
    torch.testing.assert_close(layer(inputs), wanted)


def test_layers_that_train_or_are_of_another_kind_stay() -> None:
    class Other(nn.Linear):
        pass

    assert not products.use_products(nn.Linear(8, 12))
    assert not products.use_products(Other(8, 12).requires_grad_(False))
    assert not products.use_products(nn.Linear(8, 12).bfloat16().requires_grad_(False))
