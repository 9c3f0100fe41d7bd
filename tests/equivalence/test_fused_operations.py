"""Fused norms, gated activations and rotations, forward and backward, against the models' own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prefixtune.backbone.fusion as fusion
from prefixtune.attention.forward import gradient_checkpointing
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.loss import batch_loss
from prefixtune.backbone.native.gate import Activation, GateKernel, gate_kernel, use_gate
from prefixtune.backbone.native.norm import NormKernel, RowNorm, norm_kernel
from prefixtune.backbone.native.rotation import RotationKernel, rotation_kernel, use_rotation
from prefixtune.data import Example
from prefixtune.data.batching import collate
from prefixtune.data.encoding import TokenizedExample
from prefixtune.training.config import TrainConfig
from prefixtune.training.train import train

DTYPES = [torch.float32, torch.bfloat16]
FUSED = ["llama", "qwen3", "mistral", "gemma2", "qwen2", "t5_gated"]


@pytest.fixture(scope="module")
def kernels() -> tuple[NormKernel, GateKernel, RotationKernel]:
    norm, gate, rotation = (start().result(300) for start in (norm_kernel, gate_kernel, rotation_kernel))
    if norm is None or gate is None or rotation is None:
        pytest.skip("there is no C++ compiler here")
    return norm, gate, rotation


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def results(function: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
    """Results, and gradients of a weighted sum of them."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    made = function(*leaves)
    made = [made] if isinstance(made, Tensor) else list(made)
    # Exact in every dtype.
    slopes = [draw(*one.shape, dtype=torch.bfloat16, seed=7 + n).to(one.dtype) for n, one in enumerate(made)]
    return [*made, *torch.autograd.grad(made, leaves, slopes)]


def check(ours: Callable[..., Any], plain: Callable[..., Any], exact: Callable[..., Any], *inputs: Tensor) -> None:
    """Equal to rounding in float32; in bfloat16 no farther from the exact result than the plain function."""
    found, expected = results(ours, *inputs), results(plain, *inputs)
    truth = results(exact, *(tensor.double() for tensor in inputs))
    for one, other, true in zip(found, expected, truth, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        error, plain_error = ((each.detach().double() - true).norm() for each in (one, other))
        assert one.dtype == torch.float32 or error <= 1.02 * plain_error
        if one.dtype == torch.float32:
            torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-5 * float(true.detach().abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [7, 64, 576, 1000])
@pytest.mark.parametrize("plus_one", [False, True])
def test_a_norm(dtype: torch.dtype, width: int, plus_one: bool, kernels: Any) -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = (GemmaRMSNorm if plus_one else LlamaRMSNorm)(width, 1e-5).to(dtype).requires_grad_(False)
    norm.weight.copy_(draw(width, seed=1))
    factor = norm.weight.double() + plus_one
    check(
        lambda rows: kernels[0].apply(rows, norm.weight.detach(), 1e-5, plus_one),
        norm,
        lambda rows: rows * (rows.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * factor,
        draw(2, 9, width, dtype=dtype) * torch.logspace(-2, 1, 9)[:, None].to(dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("width", [1, 48, 1537])
def test_a_gated_activation(dtype: torch.dtype, activation: Activation, width: int, kernels: Any) -> None:
    act = F.silu if activation == Activation.SILU else lambda x: F.gelu(x, approximate="tanh")

    def plain(gate: Tensor, up: Tensor) -> Tensor:
        return act(gate) * up

    check(
        lambda gate, up: kernels[1].apply(gate, up, activation),
        plain,
        plain,
        3 * draw(2, 90, width, dtype=dtype),
        draw(2, 90, width, dtype=dtype, seed=1),
    )


@pytest.mark.parametrize("activation", list(Activation))
def test_far_from_zero_an_activation_is_its_limit(activation: Activation, kernels: Any) -> None:
    gate = torch.tensor([[-1e30, -200.0, 200.0, 1e9, float("nan")]])
    found = kernels[1].apply(gate, torch.ones_like(gate), activation)
    assert torch.allclose(found[0, :4], torch.tensor([0.0, 0.0, 200.0, 1e9]), atol=1e-20)
    assert bool(found[0, 4].isnan())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "angle_rows"), [(64, 1), (10, 2)])
def test_a_rotation(dtype: torch.dtype, dim: int, angle_rows: int, kernels: Any) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    angles = 9 * draw(angle_rows, 5, dim, seed=3)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def turned_by(function: Callable[..., Any], *tables: Tensor) -> Callable[..., Any]:
        # As in a model, heads are a view of rows.
        return lambda query, key: function(query.transpose(1, 2), key.transpose(1, 2), *tables)

    check(
        turned_by(kernels[2].apply, cos, sin),
        turned_by(apply_rotary_pos_emb, cos, sin),
        turned_by(apply_rotary_pos_emb, cos.double(), sin.double()),
        draw(2, 5, 6, dim, dtype=dtype),
        draw(2, 5, 2, dim, dtype=dtype, seed=1),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_other_rows_or_threads(dtype: torch.dtype, kernels: Any) -> None:
    norm, gate, rotation = kernels
    rows, up, weight = draw(600, 100, dtype=dtype), draw(600, 100, dtype=dtype, seed=1), draw(100, dtype=dtype)
    heads, angles = draw(1, 4, 600, 24, dtype=dtype), draw(1, 600, 24, dtype=dtype, seed=1)
    functions: list[tuple[Callable[..., Any], tuple[Tensor, ...]]] = [
        (lambda x: norm.apply(x, weight, 1e-5), (rows,)),
        (lambda x, y: gate.apply(x, y, Activation.SILU), (rows, up)),
        (lambda x: rotation.apply(x, x, angles[:, : x.shape[2]], angles[:, : x.shape[2]]), (heads,)),
    ]
    threads = torch.get_num_threads()
    for function, inputs in functions:
        try:
            torch.set_num_threads(1)
            one = results(function, *inputs)
            torch.set_num_threads(3)
            several = results(function, *inputs)
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(one, several, strict=True))
    assert torch.equal(norm(rows, weight, 1e-5)[5:6], norm(rows[5:6], weight, 1e-5))
    assert torch.equal(gate.apply(rows, up, Activation.SILU)[5:6], gate.apply(rows[5:6], up[5:6], Activation.SILU))


def test_only_inputs_are_kept_for_the_backward_pass(kernels: Any) -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    rows, up = draw(6, 64).requires_grad_(), draw(6, 64, seed=1).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kernels[0].apply(rows, draw(64), 1e-5)
        assert [tensor.data_ptr() for tensor in kept] == [rows.data_ptr()]
        kept.clear()
        kernels[1].apply(rows, up, Activation.SILU)
        assert [tensor.data_ptr() for tensor in kept] == [rows.data_ptr(), up.data_ptr()]


# --- whole models ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made_backbone(tiny_models: Any, tiny_tokenizer: Any) -> Callable[..., Backbone]:
    def make(name: str, dtype: torch.dtype = torch.float32) -> Backbone:
        return Backbone.from_model(tiny_models(name).to(dtype), tiny_tokenizer, f"tiny-{name}")

    return make


def loss_and_gradient(backbone: Backbone, prefix: Any, random_ids: Any) -> list[Tensor]:
    examples = [
        TokenizedExample(tuple(random_ids(8, n)), (tuple(random_ids(4, n + 2)), tuple(random_ids(6, n + 3))))
        for n in (1, 5)
    ]
    losses = batch_loss(backbone, prefix, collate(backbone, examples))
    return [losses.detach(), *torch.autograd.grad(losses.sum(), prefix.tensors())]


@pytest.mark.parametrize("name", FUSED)
def test_a_models_gradient_is_the_plain_one(
    name: str, kernels: Any, made_backbone: Any, random_prefix: Any, random_ids: Any
) -> None:
    backbone = made_backbone(name)
    prefix, fused = random_prefix(backbone, 5), backbone.for_training
    assert fused is not backbone
    assert fused.for_training is fused
    modules = list(fused.model.modules())
    assert any(isinstance(module, RowNorm) for module in modules)
    changed = {type(module).__name__ for module in modules if "forward" in vars(module)}
    assert any("MLP" in one or "Gated" in one for one in changed)
    assert name == "t5_gated" or any("Attention" in one for one in changed)
    assert all(a is b for a, b in zip(backbone.model.parameters(), fused.model.parameters(), strict=True))
    for found, expected in zip(
        loss_and_gradient(fused, prefix, random_ids), loss_and_gradient(backbone, prefix, random_ids), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["llama", "gemma2", "t5_gated"])
def test_layers_can_be_recomputed(
    name: str, kernels: Any, made_backbone: Any, random_prefix: Any, random_ids: Any
) -> None:
    backbone = made_backbone(name)
    prefix, fused = random_prefix(backbone, 5), backbone.for_training
    kept = loss_and_gradient(fused, prefix, random_ids)
    with gradient_checkpointing(fused.model):
        recomputed = loss_and_gradient(fused, prefix, random_ids)
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_in_bfloat16_the_gradient_is_as_near_to_float32s(
    name: str, kernels: Any, made_backbone: Any, random_prefix: Any, random_ids: Any
) -> None:
    backbone = made_backbone(name, torch.bfloat16)
    wide = Backbone.from_model(copy.deepcopy(backbone.model).float(), backbone.tokenizer, "wide")
    assert backbone.for_training is not backbone
    errors = []
    for each in (backbone, backbone.for_training):
        error = 0.0
        for seed in range(6):
            prefix = random_prefix(backbone, 5, seed)
            found, exact = (loss_and_gradient(one, prefix, random_ids)[1:] for one in (each, wide))
            error += sum(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))
        errors.append(error)
    # Rounding that goes one way or the other, added up.
    assert errors[1] <= 1.1 * errors[0]


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_run_ends_where_a_plain_one_does(
    recomputed: bool, kernels: Any, made_backbone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = [Example(f"name : {name}", (f"{name} is a pub.", f"A pub: {name}.")) for name in ("Ann", "Bo", "Cy")]
    ends = []
    for number, fused in enumerate((True, True, False)):
        backbone = made_backbone("llama")
        if not fused:
            vars(backbone)["for_training"] = backbone
        config = TrainConfig(
            prefix_length=4,
            bottleneck_size=16,
            initialization="random",
            batch_size=4,
            max_steps=4,
            warmup_steps=1,
            gradient_checkpointing=recomputed,
            output=str(tmp_path / str(number)),
        )
        result = train(config, backbone=backbone, examples=examples)
        assert (backbone.for_training is not backbone) == fused
        ends.append(result.prefix.tensors())
    assert all(torch.equal(a, b) for a, b in zip(ends[0], ends[1], strict=True))
    for found, expected in zip(ends[0], ends[2], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.fixture
def no_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor where torch's own products are as quick."""
    monkeypatch.setattr(fusion, "gains", lambda: False)
    monkeypatch.setattr(fusion, "use_products", lambda module: False)


def test_what_has_no_such_operations_stays_as_it_is(kernels: Any, no_products: None, made_backbone: Any) -> None:
    gpt2 = made_backbone("gpt2")
    assert gpt2.for_training is gpt2
    llama = made_backbone("llama", torch.float16)
    assert llama.for_training is llama
    trained = made_backbone("llama")
    next(trained.model.parameters()).requires_grad_()
    assert trained.for_training is trained


def test_without_a_compiler_the_model_stays_as_it_is(
    no_products: None, made_backbone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    none: Future[None] = Future()
    none.set_result(None)
    for name in ("norm_kernel", "gate_kernel", "rotation_kernel"):
        monkeypatch.setattr(fusion, name, lambda: none)
    backbone = made_backbone("llama")
    assert backbone.for_training is backbone


def test_a_module_that_computes_something_else_stays_as_it_is(kernels: Any, made_backbone: Any) -> None:
    from transformers.models.llama import modeling_llama

    backbone = made_backbone("llama")
    mlp, attention = backbone.model.model.layers[0].mlp, backbone.model.model.layers[0].self_attn

    class OtherMLP(modeling_llama.LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x

    class OtherAttention(modeling_llama.LlamaAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    mlp.__class__, attention.__class__ = OtherMLP, OtherAttention
    assert not use_gate(mlp, kernels[1])
    assert not use_rotation(attention, kernels[2], torch.float32)
    mlp.__class__ = modeling_llama.LlamaMLP
    mlp.act_fn = nn.GELU()
    assert not use_gate(mlp, kernels[1])
    mlp.act_fn = nn.SiLU()
    assert use_gate(mlp, kernels[1])
