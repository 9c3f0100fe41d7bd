"""What goes to a GPU in one transfer, and losses in chunks of bytes."""

import pytest
import torch

from prefixtune.backbone import batch
from prefixtune.backbone import head as head_module
from prefixtune.backbone.batch import SoftLabels
from prefixtune.backbone.head import pass_in_chunks
from prefixtune.backbone.loss import cross_entropy, divergence


def test_tensors_of_several_dtypes_are_one_and_come_apart_again():
    tensors = {
        "mask": torch.tensor([[True, False, True]]),
        "ids": torch.arange(6).reshape(2, 3),
        "soft": torch.randn(5, 3),
        "none": torch.empty(0, 4, dtype=torch.int64),
        "soft_ids": torch.arange(5, dtype=torch.int32)[:, None].expand(-1, 2),
    }
    moved = []

    def move(joined):
        moved.append(joined.clone())
        return moved[-1]

    again = batch._as_one(tensors, move)
    assert [(joined.dtype, joined.dim()) for joined in moved] == [(torch.uint8, 1)]
    assert again.keys() == tensors.keys()
    assert all(
        torch.equal(again[name], tensor) and again[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    assert batch.send(tensors, torch.device("cpu"))["ids"] is tensors["ids"]


@pytest.mark.parametrize("budget", [1, 4 * 11 * 3], ids=["one row", "some rows"])
def test_the_chunks_change_nothing(budget, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(7, 4, generator=generator), torch.nn.Linear(4, 11).requires_grad_(False)
    labels, teacher = torch.arange(7), SoftLabels.from_logits(torch.randn(7, 11, generator=generator), 3)

    def computed():
        found = []
        for compute in (cross_entropy(labels), divergence(teacher)):
            given = hidden.clone().requires_grad_()
            (losses,) = pass_in_chunks(head, given, 11, compute)
            losses.mul(labels + 1).sum().backward()
            found += [losses.detach(), given.grad]
        return found

    expected = computed()
    monkeypatch.setattr(head_module, "_CPU_BYTES", budget)
    monkeypatch.setattr(head_module, "_CPU_HEAD_BYTES", 2 * budget)
    torch.testing.assert_close(computed(), expected)
