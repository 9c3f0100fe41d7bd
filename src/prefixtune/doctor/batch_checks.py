"""Checks of batches: does each row get what it gets alone, whatever is padded, packed or mixed with it?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prefixtune.backbone.batch import Batch
from prefixtune.backbone.loss import batch_loss, token_losses
from prefixtune.data.batching import collate, pack, pad
from prefixtune.data.encoding import TokenizedExample
from prefixtune.doctor.cached import prefilled_logits
from prefixtune.doctor.reference import append_tokens, compute_outputs, keep_site, outputs_one_by_one
from prefixtune.doctor.subject import CheckResult, Subject
from prefixtune.prefix.prefix import Prefix

__all__ = [
    "check_batch",
    "check_labelled",
    "check_mixed",
    "check_packing",
    "check_padded_pairs",
    "check_padding",
    "check_routes",
]


_COPIES = (2, 3, 4)
"""How often a pair is repeated in a batch, to measure how far rounding moves its gradients."""


def _padding_sides(subject: Subject) -> tuple[str, ...]:
    """Where rows may be padded: on the right only, where positions count from the row's beginning (encoders)."""
    return ("left", "right") if subject.backbone.kind == "decoder" else ("right",)


def check_routes(subject: Subject) -> CheckResult:
    """A prefix injected into attention and a prefix in the cache give the same outputs."""
    if subject.backbone.layout.cache_layers is None:
        return None
    rows, prefixes = subject.texts(4, 6, 9), [subject.first, None, subject.second]
    difference = subject.difference(
        prefilled_logits(subject.backbone, rows, prefixes),
        compute_outputs(subject.backbone, rows, prefixes, side="left"),
    )
    return subject.check_equal("logits of 3 rows", difference)


def check_padding(subject: Subject) -> CheckResult:
    """Padding on either side changes nothing."""
    rows, prefixes = subject.texts(6), [subject.first]
    reference = outputs_one_by_one(subject.backbone, rows, prefixes)
    differences = {
        side: subject.difference(compute_outputs(subject.backbone, rows, prefixes, side=side, extra=3), reference)
        for side in _padding_sides(subject)
    }
    passed, detail = subject.check_equal(subject.output_name, max(differences.values()))
    return passed, f"{detail}; {', '.join(f'{side} {difference:.1e}' for side, difference in differences.items())}"


def _compare_batch(subject: Subject, prefixes: Sequence[Prefix | None], description: str) -> CheckResult:
    """A padded batch against each of its rows alone."""
    rows = subject.texts(*(4, 6, 9, 5, 3, 8, 7)[: len(prefixes)])
    reference = outputs_one_by_one(subject.backbone, rows, prefixes)
    difference = max(
        subject.difference(compute_outputs(subject.backbone, rows, prefixes, side=side), reference)
        for side in _padding_sides(subject)
    )
    return subject.check_equal(f"{subject.output_name} of {len(rows)} rows with {description}", difference)


def check_batch(subject: Subject) -> CheckResult:
    """A padded batch with one prefix gives each row what it gets alone."""
    return _compare_batch(subject, [subject.first] * 3, "one prefix")


def check_mixed(subject: Subject) -> CheckResult:
    """A padded batch with another prefix in every row gives each row what it gets alone."""
    first, second, sites = subject.first, subject.second, subject.sites
    prefixes = [first, None, second]
    description = f"prefixes of {first.prefix_length}, none and {second.prefix_length}"
    if len(sites) > 1:
        prefixes += [keep_site(first, site) for site in sites]
        prefixes.append(Prefix({**first.layers, sites[0]: second.layers[sites[0]]}))
        description += ", of one site, and of sites of unequal length"
    return _compare_batch(subject, prefixes, description)


def _make_examples(subject: Subject) -> list[TokenizedExample]:
    """A source with two targets, and one with a single target."""
    source, other, *targets = (tuple(ids) for ids in subject.ids(4, 1, 5, 3, 4))
    return [TokenizedExample(source, tuple(targets[:2])), TokenizedExample(other, (targets[2],))]


def _losses_alone(subject: Subject, examples: Sequence[TokenizedExample], prefix: Prefix, copies: int = 1) -> Tensor:
    """The losses of each pair, computed in a batch of `copies` of it, without padding; summed over the copies."""
    backbone, losses = subject.backbone, []
    for example in examples:
        for target in example.targets:
            text = append_tokens(backbone, example.prompt, target[:-1])
            outputs = compute_outputs(backbone, [text] * copies, [prefix] * copies)
            labels = torch.tensor(target, device=backbone.device)
            losses.append(torch.stack([token_losses(row[-len(target) :].float(), labels) for row in outputs]).sum(0))
    return torch.cat(losses)


def _gradient_noise(
    subject: Subject, examples: Sequence[TokenizedExample], prefix: Prefix, references: Sequence[Tensor]
) -> float:
    """How far rounding alone moves the prefix's gradients: the most that pairs alone differ from pairs in copies.

    A gradient is a sum over the vocabulary. How precisely a matrix product adds it up depends on its number of rows and
    on the threads: MKL, with one to three rows per thread, adds term by term in float32. The noise counts up to the
    rounding error of such a sum, the dtype's epsilon times the vocabulary. A larger difference is a fault.
    """
    noise = 0.0
    for copies in _COPIES:
        loss = _losses_alone(subject, examples, prefix, copies).sum() / copies
        noise = max(noise, subject.difference(torch.autograd.grad(loss, prefix.tensors()), references))
    vocabulary = int(subject.backbone.model.get_input_embeddings().weight.shape[0])
    return min(noise, float(torch.finfo(subject.backbone.dtype).eps) * vocabulary)


def _compare_losses(subject: Subject, examples: Sequence[TokenizedExample], batch: Batch) -> CheckResult:
    """A training batch against each of its pairs alone: losses, and in float32 the gradients of the prefix."""
    leaf = subject.first.to(subject.backbone.dtype).leaves()
    with torch.enable_grad():
        losses, reference = batch_loss(subject.backbone, leaf, batch), _losses_alone(subject, examples, leaf)
        difference = subject.difference([losses], [reference])
        name = f"losses of {len(losses)} tokens"
        if not subject.is_exact:
            return subject.check_equal(name, difference)
        gradients, references = (torch.autograd.grad(loss.sum(), leaf.tensors()) for loss in (losses, reference))
        slope = subject.difference(gradients, references)
        if slope <= subject.tolerance:
            return subject.check_equal(f"{name} and their gradients", max(difference, slope))
        noise = _gradient_noise(subject, examples, leaf, references)
    equal_losses, detail = subject.check_equal(name, difference)
    # Either side may be off by the noise.
    equal_gradients, gradients_detail = subject.check_equal("their gradients", slope, 2 * noise)
    return equal_losses and equal_gradients, f"{detail}; {gradients_detail}; the same pairs unpadded: {noise:.1e}"


def check_packing(subject: Subject) -> CheckResult:
    """A packed row gives the losses and gradients that its pairs have alone."""
    backbone = subject.backbone
    if not backbone.layout.packable or backbone.kind == "encoder":
        return None
    examples = _make_examples(subject)
    start_id = backbone.decoder_start_id if backbone.kind == "encoder-decoder" else None
    return _compare_losses(subject, examples, pack(examples, decoder_start_id=start_id))


def check_padded_pairs(subject: Subject) -> CheckResult:
    """A padded batch gives the losses and gradients that its pairs have alone."""
    backbone = subject.backbone
    if backbone.kind == "encoder":
        return None
    examples = _make_examples(subject)
    start_id = backbone.decoder_start_id if backbone.kind == "encoder-decoder" else None
    return _compare_losses(subject, examples, pad(examples, pad_id=backbone.pad_id, decoder_start_id=start_id))


def check_labelled(subject: Subject) -> CheckResult:
    """A training batch gives a head the hidden states that each text has alone."""
    backbone = subject.backbone
    if backbone.kind == "encoder-decoder":
        return None
    rows = subject.ids(4, 6, 9)
    batch = collate(
        backbone, [TokenizedExample(tuple(row), ((0,) * len(row),), tuple(range(len(row)))) for row in rows]
    )
    hidden = backbone.hidden_states(**batch.inputs(backbone.device), prefixes=subject.first)
    labelled = hidden.flatten(0, 1)[batch.label_positions.to(backbone.device)]
    reference = [
        backbone.hidden_states(torch.tensor([row], device=backbone.device), prefixes=subject.first)[0] for row in rows
    ]
    return subject.check_equal(
        f"hidden states of {len(rows)} texts", subject.difference([labelled], [torch.cat(reference)])
    )
