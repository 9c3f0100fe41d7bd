"""Checks of batches: does each row get what it gets alone, whatever is padded, packed or mixed with it?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prefixtune.backbone.loss import batch_loss, token_losses
from prefixtune.data.batching import pack
from prefixtune.data.encoding import TokenizedExample
from prefixtune.doctor.cached import prefilled_logits
from prefixtune.doctor.reference import append_tokens, compute_outputs, keep_site, outputs_one_by_one
from prefixtune.doctor.subject import CheckResult, Subject
from prefixtune.prefix.prefix import Prefix

__all__ = ["check_mixed", "check_packing", "check_padding", "check_routes"]


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


def check_mixed(subject: Subject) -> CheckResult:
    """A padded batch with another prefix in every row gives each row what it gets alone."""
    first, second, sites = subject.first, subject.second, subject.sites
    prefixes = [first, None, second]
    description = f"prefixes of {first.prefix_length}, none and {second.prefix_length}"
    if len(sites) > 1:
        prefixes += [keep_site(first, site) for site in sites]
        prefixes.append(Prefix({**first.layers, sites[0]: second.layers[sites[0]]}))
        description += ", of one site, and of sites of unequal length"
    rows = subject.texts(*(4, 6, 9, 5, 3, 8, 7)[: len(prefixes)])
    reference = outputs_one_by_one(subject.backbone, rows, prefixes)
    difference = max(
        subject.difference(compute_outputs(subject.backbone, rows, prefixes, side=side), reference)
        for side in _padding_sides(subject)
    )
    return subject.check_equal(f"{subject.output_name} of {len(rows)} rows with {description}", difference)


def check_packing(subject: Subject) -> CheckResult:
    """A packed row gives the losses and gradients that its pairs have alone."""
    backbone = subject.backbone
    if not backbone.layout.packable or backbone.kind == "encoder":
        return None
    # A source with two targets, and one with a single target.
    source, other, *targets = (tuple(ids) for ids in subject.ids(4, 1, 5, 3, 4))
    examples = [TokenizedExample(source, tuple(targets[:2])), TokenizedExample(other, (targets[2],))]
    start_id = backbone.decoder_start_id if backbone.kind == "encoder-decoder" else None
    leaf = subject.first.to(backbone.dtype).leaves()
    with torch.enable_grad():
        losses = batch_loss(backbone, leaf, pack(examples, decoder_start_id=start_id))
        reference = _losses_alone(subject, examples, leaf)
        passed, detail = subject.check_equal(
            f"losses of {len(losses)} tokens", subject.difference([losses], [reference])
        )
        if not subject.is_exact:
            return passed, detail
        gradients, references = (torch.autograd.grad(loss.sum(), leaf.tensors()) for loss in (losses, reference))
    # A gradient is a sum over the vocabulary, which products of one to three rows add up term by term in float32.
    vocabulary = int(backbone.model.get_input_embeddings().weight.shape[0])
    rounding = float(torch.finfo(backbone.dtype).eps) * vocabulary
    equal, gradients_detail = subject.check_equal(
        "their gradients", subject.difference(gradients, references), rounding
    )
    return passed and equal, f"{detail}; {gradients_detail}"


def _losses_alone(subject: Subject, examples: Sequence[TokenizedExample], prefix: Prefix) -> Tensor:
    """The losses of each pair, computed alone."""
    backbone, losses = subject.backbone, []
    for example in examples:
        for target in example.targets:
            text = append_tokens(backbone, example.prompt, target[:-1])
            (outputs,) = compute_outputs(backbone, [text], [prefix])
            losses.append(token_losses(outputs[-len(target) :].float(), torch.tensor(target, device=backbone.device)))
    return torch.cat(losses)
