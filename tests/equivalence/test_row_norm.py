"""Compiled norms against the models' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.native.norm import NormKernel, RowNorm, norm_kernel, norm_of
from prefixtune.backbone.prepack import with_row_products


@pytest.fixture(scope="module")
def kernel() -> NormKernel:
    made = norm_kernel().result(300)
    if made is None:
        pytest.skip("there is no C++ compiler here")
    return made


def a_norm(kind: Any, width: int, epsilon: float = 1e-5) -> nn.Module:
    norm: nn.Module = kind(width, epsilon).to(torch.bfloat16).requires_grad_(False)
    norm.weight.copy_(torch.randn(width, generator=torch.Generator().manual_seed(1)))
    return norm


@pytest.mark.parametrize("width", [1, 7, 64, 576, 1000])
@pytest.mark.parametrize("rows", [0, 1, 3, 200])
def test_a_norm_is_the_models(kernel: NormKernel, width: int, rows: int) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = a_norm(LlamaRMSNorm, width)
    inputs = torch.randn(1, rows, width, generator=torch.Generator().manual_seed(rows)).to(torch.bfloat16)
    plain, found = norm(inputs), kernel(inputs, norm.weight, 1e-5)
    assert found.shape == plain.shape
    assert found.dtype == plain.dtype
    # Two roundings, each of which may go the other way.
    assert torch.allclose(found.float(), plain.float(), rtol=2**-6)
    assert int((found != plain).sum()) <= 1 + 0.002 * plain.numel()


def test_numbers_that_are_not_finite_stay_so(kernel: NormKernel) -> None:
    inputs = torch.ones(3, 64, dtype=torch.bfloat16)
    inputs[0, 3], inputs[1, 5] = float("nan"), float("inf")
    found = kernel(inputs, torch.ones(64, dtype=torch.bfloat16), 1e-5)
    assert bool(found[0].isnan().all())
    assert bool(found[1, 5].isnan())
    assert bool((found[2] == 1).all())


def test_only_a_norm_that_computes_the_same_is_replaced(kernel: NormKernel) -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    inputs = torch.randn(2, 48).to(torch.bfloat16)

    class OtherRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return 1.02 * super().forward(hidden_states)

    for kind, replaced in ((LlamaRMSNorm, True), (GemmaRMSNorm, True), (OtherRMSNorm, False)):
        norm = a_norm(kind, 48)
        made = norm_of(norm)
        assert made is not None
        made(inputs)
        assert (made._kernel is kernel) == replaced
        assert torch.allclose(made(inputs).float(), norm(inputs).float(), rtol=2**-6)
    trained = a_norm(LlamaRMSNorm, 48).requires_grad_()
    assert norm_of(trained) is None
    assert norm_of(a_norm(LlamaRMSNorm, 48).half()) is None
    assert norm_of(nn.LayerNorm(48).to(torch.bfloat16)) is None


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "t5"])
def test_logits_are_the_plain_ones(name: str, kernel: NormKernel, tiny_models: Any, tiny_tokenizer: Any) -> None:
    backbone = Backbone.from_model(tiny_models(name).to(torch.bfloat16), tiny_tokenizer, f"tiny-{name}")
    packed = with_row_products(backbone)
    inputs = {"input_ids": torch.tensor([[5, 9, 3]])}
    if backbone.kind == "encoder-decoder":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.inference_mode():
        packed.model(**inputs)
        plain, other = (each.model(**inputs).logits.float() for each in (backbone, packed))
    assert (other - plain).norm() <= 0.01 * plain.norm()
    norms = [module for module in packed.model.modules() if isinstance(module, RowNorm)]
    assert norms
    assert all(norm._kernel is kernel for norm in norms)
    assert norms[0].weight is next(m for m in backbone.model.modules() if "Norm" in type(m).__name__).weight
