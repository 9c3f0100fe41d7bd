"""Muon for a prefix's numbers: against singular value decompositions, and in runs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import prefixtune as pt
from prefixtune.errors import ConfigError
from prefixtune.prefix.encoder import PrefixEncoder
from prefixtune.prefix.geometry import LayerShape
from prefixtune.training.optimizer import Muon, make_optimizers, orthogonalize


def by_singular_values(matrix: Tensor) -> Tensor:
    """The five rounds, applied to the singular values alone."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.square().sum().sqrt()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ torch.diag(values) @ right


@pytest.mark.parametrize(("rows", "columns"), [(4, 9), (9, 4), (6, 6), (1, 5), (5, 1)])
def test_directions_are_kept_and_their_sizes_made_alike(rows: int, columns: int) -> None:
    matrices = torch.randn(3, rows, columns, dtype=torch.float64) * torch.tensor([1e-6, 1.0, 1e6])[:, None, None]
    made = orthogonalize(matrices)
    for matrix, found in zip(matrices, made, strict=True):
        assert torch.allclose(found, by_singular_values(matrix), atol=1e-9)
        # The Frobenius norm is a bound of the largest: the smallest must be a hundredth of it to come near 1.
        values = torch.linalg.svdvals(matrix)
        large = values > 0.01 * values.square().sum().sqrt()
        assert ((torch.linalg.svdvals(found) - 0.95).abs()[large] < 0.3).all()
    assert torch.equal(orthogonalize(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_steps_are_those_of_each_matrix_alone() -> None:
    """Keys and values of two layers of different widths, over steps with momentum, look-ahead and decay."""
    widths, lr, momentum, decay = (4, 6, 4, 6), 0.1, 0.8, 0.5
    numbers = torch.randn(5, sum(widths), dtype=torch.float64)
    expected, moment = numbers.clone(), torch.zeros_like(numbers)
    optimizer = Muon({numbers: widths}, lr, momentum=momentum, weight_decay=decay)
    for _ in range(4):
        gradient = torch.randn_like(numbers)
        numbers.grad = gradient
        optimizer.step()
        moment = momentum * moment + gradient
        expected = expected * (1 - lr * decay)
        for begin, end in pairwise([0, 4, 10, 14, 20]):
            step = by_singular_values((gradient + momentum * moment)[:, begin:end])
            expected[:, begin:end] -= lr * step / step.square().mean().sqrt()
    assert torch.allclose(numbers, expected, atol=1e-9)


def test_what_has_no_gradient_does_not_move() -> None:
    numbers, other = torch.randn(3, 4), torch.randn(3, 4)
    before = numbers.clone(), other.clone()
    numbers.grad = torch.zeros_like(numbers)
    Muon({numbers: (2, 2), other: (4,)}, 0.1).step()
    assert torch.equal(numbers, before[0])
    assert torch.equal(other, before[1])


def test_the_matrices_of_a_prefix_are_the_keys_and_the_values_of_each_layer() -> None:
    shapes = (LayerShape(2, 8, 8), LayerShape(1, 8, 4))
    sizes = {"embedding_size": 4, "bottleneck_size": 4}
    encoder = PrefixEncoder("scaled", {"encoder": shapes, "cross": shapes[:1]}, {"encoder": 3, "cross": 2}, **sizes)
    found = {tuple(numbers.shape): widths for numbers, widths in encoder.matrices().items()}
    assert found == {(3, 44): (16, 16, 8, 4), (2, 32): (16, 16)}
    assert PrefixEncoder("residual", {"cross": shapes}, 2, **sizes).matrices() == {}
    # A head beside them moves by AdamW, at the ratio of the two usual rates.
    encoder = PrefixEncoder("none", {"encoder": shapes}, 3, **sizes, head=(2, 6))
    muon, adamw = make_optimizers(pt.TrainConfig(optimizer="muon"), encoder, [])
    assert [tuple(numbers.shape) for numbers in muon.param_groups[0]["params"]] == [(3, 44)]
    assert [tuple(numbers.shape) for numbers in adamw.param_groups[0]["params"]] == [(2, 6), (2,)]
    assert adamw.param_groups[0]["per_rate"] == 2e-2 / 4e-3
    (alone,) = make_optimizers(pt.TrainConfig(), encoder, [])
    assert "per_rate" not in muon.param_groups[0].keys() | alone.param_groups[0].keys()


HEAD = {
    "task": "classification",
    "classifier": "head",
    "examples": [pt.Example(letter, (letter * 2,)) for letter in "abcd"],
}


@pytest.mark.parametrize("options", [{}, {"reparameterization": "none"}, {"method": "prompt"}, HEAD])
def test_a_run_learns_and_goes_on_where_it_stopped(
    options: dict[str, Any], train: Callable[..., Any], train_until: Callable[..., None], tmp_path: Path
) -> None:
    options = {**options, "optimizer": "muon", "learning_rate": 0.01}

    def losses(result: Any) -> list[float]:
        return [event["loss"] for event in result.events if event["event"] == "step"]

    whole = train(6, **options)
    assert losses(whole)[-1] < losses(whole)[0]
    assert whole.prefix.header["training"]["optimizer"] == "muon"
    again = {**options, "output": str(tmp_path / "again")}
    train_until(3, 6, **again)
    resumed = train(6, resume=True, **again)
    assert losses(resumed) == losses(whole)
    assert resumed.prefix.equal(whole.prefix)


def test_a_run_is_not_resumed_with_another_optimizer(train: Callable[..., Any]) -> None:
    train(2)
    with pytest.raises(ConfigError, match="optimizer was 'adamw', is 'muon'"):
        train(4, resume=True, optimizer="muon")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reparameterization": "mlp"}, "reparameterization 'mlp' trains an MLP"),
        ({"reparameterization": "residual"}, "reparameterization 'residual' trains an MLP"),
        ({"method": "lora"}, "optimizer 'muon' is for a prefix, which method 'lora' does not train"),
        ({"method": "full"}, "optimizer 'muon' is for a prefix, which method 'full' does not train"),
    ],
)
def test_what_muon_does_not_move(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pt.TrainConfig(optimizer="muon", **options)
