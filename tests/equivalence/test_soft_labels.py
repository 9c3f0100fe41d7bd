"""The loss against a teacher's likeliest tokens, against torch's own divergence on full distributions in float64."""

import dataclasses

import pytest
import torch

from prefixtune.attention.record import prefix_from_tokens
from prefixtune.backbone.batch import SoftLabels
from prefixtune.backbone.head import pass_in_chunks
from prefixtune.backbone.loss import batch_loss, divergence, teacher_labels
from prefixtune.data.batching import collate, join, pack, pad
from prefixtune.data.encoding import TokenizedExample
from prefixtune.data.tokenized import epoch_batches

VOCABULARY = 60


def random_logits(seed, rows=37, size=VOCABULARY):
    return 3 * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def soft_losses(logits, labels):
    (losses,) = pass_in_chunks(lambda given: given, logits, logits.shape[1], divergence(labels))
    return losses


def exact_divergence(teacher, student, k):
    """With torch's own `kl_div`, on the distributions over the k likeliest tokens and all others as one."""
    ids = teacher.topk(k, dim=-1).indices

    def outcomes(logits):
        probabilities = logits.softmax(dim=-1)
        kept = probabilities.gather(1, ids)
        return torch.cat([kept, 1 - kept.sum(dim=1, keepdim=True)], dim=1)

    return torch.nn.functional.kl_div(outcomes(student).log(), outcomes(teacher), reduction="none").sum(1)


def test_losses_and_slopes_are_those_of_autograd_on_full_distributions():
    teacher, student = random_logits(0), random_logits(1).requires_grad_()
    weights = torch.rand(len(teacher), dtype=torch.float64)
    wanted = exact_divergence(teacher, student, 20)
    (slopes,) = torch.autograd.grad((wanted * weights).sum(), student)
    losses = soft_losses(student, SoftLabels.from_logits(teacher))
    (own,) = torch.autograd.grad((losses * weights).sum(), student)
    torch.testing.assert_close(losses, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(own, slopes, rtol=1e-10, atol=1e-10)


def test_the_whole_vocabulary_gives_the_full_divergence_and_fewer_tokens_give_less():
    teacher, student = random_logits(5), random_logits(6)
    target, log_probs = teacher.softmax(-1), student.log_softmax(-1)
    full = torch.nn.functional.kl_div(log_probs, target, reduction="none").sum(1)
    torch.testing.assert_close(soft_losses(student, SoftLabels.from_logits(teacher, VOCABULARY)), full)
    some = soft_losses(student, SoftLabels.from_logits(teacher, 5))
    assert bool((some >= 0).all())
    assert bool((some <= full + 1e-9).all())
    assert float(some.sum()) < float(full.sum())


def test_certain_labels_give_the_cross_entropy_and_its_slopes():
    logits = random_logits(7).float().requires_grad_()
    labels = torch.randint(0, VOCABULARY, (len(logits),), generator=torch.Generator().manual_seed(8))
    (wanted,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels, reduction="none").sum(), logits)
    losses = soft_losses(logits, SoftLabels.from_labels(labels))
    (slopes,) = torch.autograd.grad(losses.sum(), logits)
    torch.testing.assert_close(losses, torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
    torch.testing.assert_close(slopes, wanted)


# --- through batches ---


def soft_example(seed, num_targets, *, soft=True):
    random = torch.Generator().manual_seed(seed)
    lengths = [2 + (seed + number) % 4 for number in range(num_targets)]
    targets = tuple(tuple(torch.randint(3, 100, (n,), generator=random).tolist()) for n in lengths)
    labels = tuple(SoftLabels.from_logits(torch.randn(n, 100, generator=random)) for n in lengths)
    prompt = tuple(torch.randint(3, 100, (5,), generator=random).tolist())
    return TokenizedExample(prompt, targets, soft_targets=labels if soft else ())


def test_packed_and_padded_rows_have_the_same_losses(tiny_backbone):
    backbone = tiny_backbone("llama")
    prefix = prefix_from_tokens(backbone.model, backbone.layout, torch.tensor([[5, 6, 7]]))
    examples = [soft_example(1, 2), soft_example(2, 3)]
    packed = batch_loss(backbone, prefix, pack(examples))
    padded = batch_loss(backbone, prefix, pad(examples, pad_id=backbone.pad_id))
    torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-5)


def test_targets_keep_their_own_labels_when_they_are_shuffled_and_divided(tiny_backbone):
    backbone = tiny_backbone("llama")
    examples = [soft_example(seed, 5) for seed in range(4)]
    of_target = {
        (example.prompt, target): labels.ids
        for example in examples
        for target, labels in zip(example.targets, example.soft_targets, strict=True)
    }
    seen = 0
    for groups in epoch_batches(examples, batch_size=3, targets_per_source=2, seed=0):
        for group in groups:
            for target, labels in zip(group.targets, group.soft_targets, strict=True):
                assert torch.equal(labels.ids, of_target[group.prompt, target])
                seen += 1
        assert len(collate(backbone, groups).soft_labels) == sum(len(t) for g in groups for t in g.targets)
    assert seen == 20


@pytest.mark.parametrize("soft", [True, False], ids=["all soft", "one certain"])
def test_joined_rows_have_the_losses_that_they_have_alone(tiny_backbone, soft):
    backbone = tiny_backbone("llama")
    batches = [pack([soft_example(1, 2)]), pack([soft_example(2, 3, soft=soft)])]
    prefixes = [prefix_from_tokens(backbone.model, backbone.layout, torch.tensor([[5, 6, 7 + n]])) for n in range(2)]
    alone = [batch_loss(backbone, prefix, batch) for prefix, batch in zip(prefixes, batches, strict=True)]
    torch.testing.assert_close(batch_loss(backbone, prefixes, join(batches)), torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_the_model_itself_as_the_teacher_gives_no_loss_and_no_gradient(tiny_backbone):
    backbone = tiny_backbone("gpt2")
    prefix = prefix_from_tokens(backbone.model, backbone.layout, torch.tensor([[5, 6, 7]]))
    hard = soft_example(3, 3, soft=False)
    labels = teacher_labels(backbone, prefix, pack([hard]), lengths=[len(target) for target in hard.targets])
    soft = dataclasses.replace(hard, soft_targets=tuple(labels))
    leaf = prefix.leaves()
    losses = batch_loss(backbone, leaf, pack([soft]))
    losses.sum().backward()
    assert float(losses.detach().abs().max()) < 1e-5
    assert all(float(tensor.grad.abs().max()) < 1e-4 for tensor in leaf.stored_tensors())


def test_labels_that_are_no_numbers_are_no_loss_of_zero():
    labels = SoftLabels.from_logits(torch.full((2, 60), torch.nan))
    assert soft_losses(torch.randn(2, 60), labels).isnan().all()
