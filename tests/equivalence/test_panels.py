"""Products by compiled code from a matrix in panels, against float32's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.native import panels
from prefixtune.backbone.native.panels import PanelKernel, PanelMatrix, panel_kernel
from prefixtune.backbone.prepack import PrepackedLinear, prepack
from prefixtune.engine.config import EngineConfig
from prefixtune.engine.engine import Engine
from prefixtune.engine.request import Request, SamplingParams


@pytest.fixture(scope="module")
def kernel() -> PanelKernel:
    kernel = panel_kernel(300.0)
    if kernel is None:
        pytest.skip("this machine gains nothing by panels, or compiles nothing")
    return kernel


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(torch.bfloat16)


@pytest.mark.parametrize(("outer", "inner"), [(1, 2), (15, 64), (16, 30), (17, 576), (48, 130), (500, 66), (4100, 34)])
@pytest.mark.parametrize("by_column", [False, True])
def test_any_number_of_rows_is_rounded_once(outer: int, inner: int, by_column: bool, kernel: PanelKernel):
    weight, bias = rand(outer, inner), rand(outer)
    if by_column:
        weight = weight.t().contiguous().t()
    for matrix, given in ((PanelMatrix(kernel, weight, bias), bias), (PanelMatrix(kernel, weight), None)):
        for rows in (0, 1, 2, 7, 14, 15, 16, 29, 63, 64, 65, 131):
            inputs = rand(rows, inner)
            found = matrix.multiply(inputs)
            expected = F.linear(inputs.float(), weight.float(), None if given is None else given.float())
            assert found.dtype == torch.bfloat16
            torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize(("outer", "inner"), [(1, 2), (16, 30), (17, 576), (500, 66)])
def test_an_int8_product_is_rounded_once(outer: int, inner: int, kernel: PanelKernel):
    draw = torch.Generator().manual_seed(outer)
    weight = torch.randint(-128, 128, (outer, inner), generator=draw, dtype=torch.int8)
    scales, bias = torch.rand(outer, generator=draw), rand(outer)
    for given in (bias, None):
        matrix = PanelMatrix(kernel, weight, given, scales)
        for rows in (1, 2, 14, 15, 63, 64, 131):
            inputs = rand(rows, inner)
            plain = weight.double() * scales.double()[:, None]
            expected = F.linear(inputs.double(), plain, None if given is None else given.double())
            # Sums of floats of this size come before the rounding.
            near = 1e-6 * float(inputs.double().abs().matmul(plain.abs().t()).max())
            torch.testing.assert_close(matrix.multiply(inputs).double(), expected, rtol=2**-8, atol=near)
            alone = torch.cat([matrix.multiply(row[None]) for row in inputs[:3]])
            assert torch.equal(matrix.multiply(inputs)[:3], alone)


def test_inputs_have_any_shape_and_order(kernel: PanelKernel):
    weight = rand(20, 8)
    matrix, inputs = PanelMatrix(kernel, weight), rand(8, 3, 5).permute(1, 2, 0)
    assert torch.equal(matrix.multiply(inputs), matrix.multiply(inputs.reshape(15, 8)).reshape(3, 5, 20))
    with pytest.raises(TypeError, match="float32"):
        matrix.multiply(inputs.float())
    with pytest.raises(TypeError, match="for a matrix of 8"):
        matrix.multiply(rand(2, 4))


def test_a_row_is_the_same_beside_others_and_with_any_number_of_threads(kernel: PanelKernel):
    matrix, inputs = PanelMatrix(kernel, rand(700, 200), rand(700)), rand(90, 200)
    expected = torch.cat([matrix.multiply(row[None]) for row in inputs])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(matrix.multiply(inputs), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("weight", "bias"),
    [
        (torch.ones(4, 3, dtype=torch.bfloat16), None),
        (torch.ones(4, 4), None),
        (torch.ones(4, 4, dtype=torch.bfloat16), torch.ones(4)),
    ],
)
def test_other_matrices_are_left(weight: torch.Tensor, bias: torch.Tensor | None):
    assert not PanelMatrix.suits(weight, bias)
    assert PanelMatrix.suits(torch.ones(4, 4, dtype=torch.bfloat16))
    numbers = torch.ones(4, 4, dtype=torch.int8)
    assert PanelMatrix.suits(numbers, None, torch.ones(4))
    assert not PanelMatrix.suits(numbers)
    assert not PanelMatrix.suits(numbers, None, torch.ones(4, dtype=torch.bfloat16))


def test_a_text_differs_from_the_plain_model_s_at_a_close_choice_only(
    kernel: PanelKernel, tiny_models: Any, tiny_tokenizer: Any, random_ids: Any
):
    backbone = Backbone.from_model(tiny_models("llama").to(torch.bfloat16), tiny_tokenizer, "tiny-llama")
    sampling = SamplingParams(max_new_tokens=24, min_new_tokens=24)
    asked = [Request(tuple(random_ids(7, seed)), None, sampling) for seed in range(6)]
    texts = [Engine(backbone, EngineConfig(prepack=packs)).run(asked) for packs in (False, True)]
    for request, one, other in zip(asked, *texts, strict=True):
        plain, packed = ([token.id for token in text[0].tokens] for text in (one, other))
        first = next((i for i, (a, b) in enumerate(zip(plain, packed, strict=True)) if a != b), None)
        if first is None:
            continue
        ids = torch.tensor([[*request.prompt, *plain[:first]]])
        with torch.inference_mode():
            logits = backbone.model(input_ids=ids).logits[0, -1].float()
        assert float((logits[plain[first]] - logits[packed[first]]).abs()) <= 0.02 * float(logits.abs().max())


def test_a_model_that_panels_do_not_suit_is_packed_without(
    kernel: PanelKernel, tiny_models: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    backbone = Backbone.from_model(tiny_models("llama").to(torch.bfloat16), tiny_tokenizer, "tiny-llama")
    monkeypatch.setattr(PanelMatrix, "multiply", lambda self, given: given.new_ones(*given.shape[:-1], self.outer))
    packed = prepack(backbone)
    assert packed is not backbone
    assert packed.model.lm_head.weight.layout == torch._mkldnn


def engine_texts(backbone: Backbone, count: int) -> list[list[int]]:
    asked = [Request((5 + n, 7, 9), None, SamplingParams(max_new_tokens=10)) for n in range(count)]
    return [[token.id for token in texts[0].tokens] for texts in Engine(backbone, EngineConfig()).run(asked)]


def test_a_text_is_the_same_alone_and_beside_others(
    kernel: PanelKernel, tiny_models: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    backbone = Backbone.from_model(tiny_models("llama").to(torch.bfloat16), tiny_tokenizer, "tiny-llama")
    packed = prepack(backbone)
    linears = [module for module in packed.model.modules() if isinstance(module, PrepackedLinear)]
    assert linears
    assert all(linear.weight.layout == torch.strided for linear in linears), "in panels"
    assert engine_texts(backbone, 1) == engine_texts(backbone, 20)[:1]
    # Without the compiled products, oneDNN's.
    monkeypatch.setattr(panels, "_gains", lambda: False)
    assert panel_kernel() is None
