"""Compiled products of one or two rows against torch's."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.native import linear
from prefixtune.backbone.native.linear import MOST_ROWS, RowKernel, RowMatrix, row_kernel
from prefixtune.backbone.prepack import PrepackedLinear, with_row_products
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate_ids
from prefixtune.utils.native.build import build, private_folder, start

SOURCE = Path(linear.__file__).with_name("linear.cpp")


@pytest.fixture(scope="module")
def kernel() -> RowKernel:
    made = row_kernel().result(300)
    if made is None:
        pytest.skip("there is no C++ compiler here")
    return made


def in_bf16(name: str, tiny_models: Any, tokenizer: Any) -> Backbone:
    return Backbone.from_model(tiny_models(name).to(torch.bfloat16), tokenizer, f"tiny-{name}")


@pytest.mark.parametrize(("outer", "inner"), [(576, 576), (192, 576), (77, 1030), (300, 31), (5, 7), (1, 1)])
@pytest.mark.parametrize("rows", range(1, MOST_ROWS + 1))
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_product_is_the_rounded_one(kernel: RowKernel, outer: int, inner: int, rows: int, has_bias: bool) -> None:
    draw = torch.Generator().manual_seed(outer + inner)
    weight, bias, inputs = (
        torch.randn(*shape, generator=draw).to(torch.bfloat16) for shape in ((outer, inner), (outer,), (1, rows, inner))
    )
    given = bias if has_bias else None
    found = kernel.multiply(inputs, RowMatrix(weight, given))
    expected = F.linear(inputs.double(), weight.double(), bias.double() if has_bias else None)
    assert found.shape == expected.shape
    assert found.dtype == torch.bfloat16
    # Half of a bf16's last bit, and what floats of the sum are off by.
    bound = expected.abs() * 2**-8 + 1e-5 * inner**0.5
    assert bool(((found.double() - expected).abs() <= bound).all())


def test_an_int8_product_is_the_rounded_one(kernel: RowKernel) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randint(-128, 128, (333, 577), generator=draw, dtype=torch.int8)
    scales, inputs = torch.rand(333, generator=draw), torch.randn(2, 577, generator=draw).to(torch.bfloat16)
    found = kernel.multiply(inputs, RowMatrix(weight, None, scales)).double()
    expected = F.linear(inputs.double(), weight.double() * scales.double()[:, None])
    assert torch.allclose(found, expected, rtol=2**-8, atol=1e-2)


def test_numbers_that_are_not_finite_stay_so(kernel: RowKernel) -> None:
    weight = torch.ones(64, 96, dtype=torch.bfloat16)
    inputs = torch.ones(2, 96, dtype=torch.bfloat16)
    inputs[0, 3], inputs[1, 5] = float("nan"), float("inf")
    found = kernel.multiply(inputs, RowMatrix(weight))
    assert bool(found[0].isnan().all())
    assert bool((found[1] == float("inf")).all())


def test_inputs_of_any_layout(kernel: RowKernel) -> None:
    weight = torch.randn(40, 64).to(torch.bfloat16)
    inputs = torch.randn(64, 2).to(torch.bfloat16).t()
    assert torch.allclose(kernel.multiply(inputs, RowMatrix(weight)), F.linear(inputs, weight), rtol=0.02, atol=0.02)
    assert kernel.multiply(inputs[:0], RowMatrix(weight)).shape == (0, 40)


def test_only_plain_tensors_suit() -> None:
    weight = torch.ones(4, 6, dtype=torch.bfloat16)
    assert RowMatrix.suits(weight, weight[0, :4])
    assert not RowMatrix.suits(weight.float())
    assert not RowMatrix.suits(weight.t())
    assert not RowMatrix.suits(weight.to("meta"))
    assert not RowMatrix.suits(weight, torch.ones(4))
    assert RowMatrix.suits(weight.to(torch.int8), None, torch.ones(4))
    assert not RowMatrix.suits(weight.to(torch.int8))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bart", "t5"])
def test_logits_of_one_token_are_the_plain_ones(
    name: str, kernel: RowKernel, tiny_models: Any, tiny_tokenizer: Any
) -> None:
    backbone = in_bf16(name, tiny_models, tiny_tokenizer)
    by_row = with_row_products(backbone)
    inputs = {"input_ids": torch.tensor([[5], [9]])}
    if backbone.kind == "encoder-decoder":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.inference_mode():
        plain, other = (each.model(**inputs).logits.float() for each in (backbone, by_row))
    assert (other - plain).norm() <= 0.01 * plain.norm()
    replaced = [module for module in by_row.model.modules() if isinstance(module, PrepackedLinear)]
    assert replaced
    assert all(module._kernel is kernel for module in replaced)
    # No weight is copied.
    pointers = {parameter.data_ptr() for parameter in backbone.model.parameters()}
    assert {module.weight.data_ptr() for module in replaced} <= pointers
    assert by_row.model.get_input_embeddings().weight is backbone.model.get_input_embeddings().weight


def test_a_text_differs_at_a_close_choice_only(
    kernel: RowKernel,
    tiny_models: Any,
    tiny_tokenizer: Any,
    random_ids: Any,
    random_prefix: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("prefixtune.inference.generate.suits_engine", lambda *_: False)
    backbone = in_bf16("llama", tiny_models, tiny_tokenizer)
    assert backbone.for_single_texts is backbone.for_single_texts is not backbone
    plain = dataclasses.replace(backbone)
    plain.__dict__["for_single_texts"] = plain
    config, prefix = GenerateConfig(max_new_tokens=24, min_new_tokens=24), random_prefix(backbone, 4, 0).detach()
    for seed in range(3):
        prompt = random_ids(7, seed)
        one, other = (generate_ids(each, [prompt], [prefix], config=config)[0] for each in (plain, backbone))
        first = next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
        if first is None:
            continue
        ids = torch.tensor([[*prompt, *one[:first]]])
        with torch.inference_mode():
            logits = plain.forward(ids, prefixes=prefix).logits[0, -1].float()
        assert float((logits[one[first]] - logits[other[first]]).abs()) <= 0.02 * float(logits.abs().max())


def test_many_texts_are_generated_by_the_plain_model(tiny_models: Any, tiny_tokenizer: Any, random_ids: Any) -> None:
    backbone = in_bf16("llama", tiny_models, tiny_tokenizer)
    generate_ids(backbone, [random_ids(4)] * 3, [None] * 3, config=GenerateConfig(max_new_tokens=2))
    assert "for_single_texts" not in vars(backbone)


def test_what_gains_nothing_stays_as_it_is(tiny_backbone: Any) -> None:
    in_float32 = tiny_backbone("llama")
    assert in_float32.for_single_texts is in_float32


def test_without_a_compiler_torch_computes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tiny_models: Any, tiny_tokenizer: Any
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    future = start(SOURCE, RowKernel, "products of single rows run")
    with caplog.at_level(logging.WARNING):
        assert future.result(60) is None
    assert [record.message for record in caplog.records] == [
        "products of single rows run with torch alone, which is slower: there is no C++ compiler "
        "(install g++ or clang++, or with pip: prefixtune[compiler])."
    ]
    monkeypatch.setattr("prefixtune.backbone.prepack.row_kernel", lambda: future)
    layer = nn.Linear(8, 4).to(torch.bfloat16)
    packed = PrepackedLinear(layer.weight.detach(), layer.bias.detach(), reorder=False)
    inputs = torch.randn(1, 8).to(torch.bfloat16)
    assert torch.equal(packed(inputs), layer(inputs))
    assert packed._matrix is None, "the weight is not held for nothing"


def test_a_broken_compiler_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'x: error: out of order' >&2\nexit 1\n", encoding="utf-8")
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(OSError, match="failed: x: error: out of order"):
        build(SOURCE, tmp_path / "native")


def test_a_folder_that_others_can_write_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "native"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(OSError, match="only its user can write"):
        private_folder(folder)
    folder.chmod(0o700)
    assert private_folder(folder) == folder
