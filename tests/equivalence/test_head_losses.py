"""The loss without all logits in memory against that of the logits."""

import pytest
import torch
from torch import nn

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.head import pass_in_chunks
from prefixtune.backbone.loss import batch_loss, cross_entropy
from prefixtune.data.batching import collate
from prefixtune.data.encoding import TokenizedExample


def head_losses(hidden, head, labels):
    (losses,) = pass_in_chunks(head, hidden, head.out_features, cross_entropy(labels))
    return losses


def token_losses(logits, labels):
    return nn.functional.cross_entropy(logits.float(), labels, reduction="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 128, 300])
@pytest.mark.parametrize(("vocabulary", "bias"), [(50, False), (50, True), (1200, False)])
def test_losses_are_those_of_the_logits(dtype, rows, vocabulary, bias):
    draw = torch.Generator().manual_seed(rows)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = nn.Linear(24, vocabulary, bias=bias).to(dtype).requires_grad_(False)
    hidden = (4 * torch.randn(rows, 24, generator=draw)).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (rows,), generator=draw)
    weights = torch.rand(rows, generator=draw) / rows
    found = head_losses(hidden, head, labels)
    logits = head(hidden).detach().requires_grad_()
    (expected,) = pass_in_chunks(lambda given: given, logits, vocabulary, cross_entropy(labels))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    (slopes,) = torch.autograd.grad((found * weights).sum(), hidden)
    (by_logits,) = torch.autograd.grad(expected.sum(), logits)
    wanted = (by_logits * weights[:, None].to(dtype)) @ head.weight
    assert slopes.dtype == dtype
    near = 1e-5 if dtype == torch.float32 else 0.01
    assert (slopes - wanted).norm() <= near * wanted.norm()
    exact = hidden.detach().double().requires_grad_()
    logits = nn.functional.linear(exact, head.weight.double(), None if head.bias is None else head.bias.double())
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    (true,) = torch.autograd.grad((losses * weights.double()).sum(), exact)
    assert (slopes - true).norm() <= 1.05 * (wanted - true).norm() + 1e-6 * true.norm()


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_not_hidden(broken):
    head = nn.Linear(4, 1100, bias=False).requires_grad_(False)
    hidden = torch.ones(3, 4)
    hidden[1, 2] = broken
    losses = head_losses(hidden.requires_grad_(), head, torch.tensor([0, 5, 1099]))
    assert losses.isfinite().tolist() == [True, False, True]


def test_a_label_that_is_none_is_an_error():
    head = nn.Linear(4, 1100, bias=False).requires_grad_(False)
    with pytest.raises(RuntimeError, match="out of bounds"):
        head_losses(torch.ones(1, 4).requires_grad_(), head, torch.tensor([1100]))


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "gemma2", "granite", "bart"])
def test_a_models_loss_is_that_of_its_logits(name, tiny_models, tiny_tokenizer, random_prefix, random_ids):
    changes = {"logits_scaling": 4.0} if name == "granite" else {}
    backbone = Backbone.from_model(tiny_models(name, **changes), tiny_tokenizer, f"tiny-{name}")
    assert backbone.head._rest is not None
    prefix = random_prefix(backbone, 5)
    batch = collate(backbone, [TokenizedExample(tuple(random_ids(8, 1)), (tuple(random_ids(6, 2)),))] * 2)
    losses = batch_loss(backbone, prefix, batch)
    slopes = torch.autograd.grad(losses.sum(), prefix.tensors())
    with torch.no_grad():
        assert torch.allclose(batch_loss(backbone, prefix, batch), losses, atol=1e-5)
    logits = backbone.forward(**batch.inputs(backbone.device), prefixes=prefix).logits
    rows, columns = batch.label_positions // batch.width, batch.label_positions % batch.width
    whole = token_losses(logits[rows, columns], batch.labels)
    torch.testing.assert_close(losses, whole, rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad(whole.sum(), prefix.tensors())
    for found, wanted in zip(slopes, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_a_head_that_trains_gets_its_gradient(tiny_models, tiny_tokenizer, random_ids):
    backbone = Backbone.from_model(tiny_models("llama"), tiny_tokenizer, "tiny")
    weight = backbone.model.lm_head.weight.requires_grad_()
    batch = collate(backbone, [TokenizedExample(tuple(random_ids(8, 1)), (tuple(random_ids(6, 2)),))])
    (slopes,) = torch.autograd.grad(batch_loss(backbone, None, batch).sum(), weight)
    logits = backbone.forward(**batch.inputs(backbone.device)).logits[0, batch.label_positions]
    (wanted,) = torch.autograd.grad(token_losses(logits, batch.labels).sum(), weight)
    torch.testing.assert_close(slopes, wanted, rtol=1e-4, atol=1e-5)


def test_a_model_that_is_not_understood_is_asked_for_its_logits(tiny_models, tiny_tokenizer, random_ids):
    model = tiny_models("llama")
    forward = model.forward

    def odd(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits.sigmoid()
        return output

    model.forward = odd
    try:
        backbone = Backbone.from_model(model, tiny_tokenizer, "odd", self_check=False)
        batch = collate(backbone, [TokenizedExample(tuple(random_ids(8, 1)), (tuple(random_ids(6, 2)),))])
        logits = backbone.forward(**batch.inputs(backbone.device)).logits[0, batch.label_positions]
        torch.testing.assert_close(batch_loss(backbone, None, batch), token_losses(logits, batch.labels))
    finally:
        del model.forward
