"""Batch checks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prefixtune.backbone.batch import Batch
from prefixtune.backbone.loss import batch_loss, token_losses
from prefixtune.data.batching import collate, pack, pad
from prefixtune.data.encoding import TokenizedExample
from prefixtune.doctor.reference import alone, only, outputs, prefilled, recomputed
from prefixtune.doctor.subject import Finding, Subject
from prefixtune.prefix.prefix import Prefix

# --- rows and batches ------------------------------------------------------------------------------------------------


def _sides(subject: Subject) -> tuple[str, ...]:
    """Where rows are padded. An encoder's positions are counted from the row's beginning, padding or not."""
    return ("left", "right") if subject.backbone.kind == "decoder" else ("right",)


def check_routes(subject: Subject) -> Finding:
    """The injected and the prefilled route give the same outputs."""
    if subject.backbone.layout.cache_layers is None:
        return None
    rows, prefixes = subject.texts(4, 6, 9), [subject.first, None, subject.second]
    distance = subject.distance(
        prefilled(subject.backbone, rows, prefixes),
        outputs(subject.backbone, rows, prefixes, side="left"),
    )
    return subject.same("logits of 3 rows", distance)


def check_padding(subject: Subject) -> Finding:
    """Padding on either side changes nothing."""
    rows, prefixes = subject.texts(6), [subject.first]
    reference = alone(subject.backbone, rows, prefixes)
    distances = {
        side: subject.distance(outputs(subject.backbone, rows, prefixes, side=side, extra=3), reference)
        for side in _sides(subject)
    }
    passed, detail = subject.same(subject.outputs, max(distances.values()))
    return passed, f"{detail}; {', '.join(f'{side} {distance:.1e}' for side, distance in distances.items())}"


def _batched(subject: Subject, prefixes: Sequence[Prefix | None], what: str) -> Finding:
    rows = subject.texts(*(4, 6, 9, 5, 3, 8, 7)[: len(prefixes)])
    reference = alone(subject.backbone, rows, prefixes)
    distance = max(
        subject.distance(outputs(subject.backbone, rows, prefixes, side=side), reference) for side in _sides(subject)
    )
    return subject.same(f"{subject.outputs} of {len(rows)} rows with {what}", distance)


def check_batch(subject: Subject) -> Finding:
    """A padded batch with one prefix gives each row what it gets alone."""
    return _batched(subject, [subject.first] * 3, "one prefix")


def check_mixed(subject: Subject) -> Finding:
    """A batch whose rows have prefixes of their own gives each row what it gets alone."""
    first, second, sites = subject.first, subject.second, subject.sites
    prefixes = [first, None, second]
    what = f"prefixes of {first.prefix_length}, none and {second.prefix_length}"
    if len(sites) > 1:
        prefixes += [only(first, site) for site in sites]
        prefixes.append(Prefix({**first.layers, sites[0]: second.layers[sites[0]]}))
        what += ", of one site, and of unequal sites"
    return _batched(subject, prefixes, what)


def _examples(subject: Subject) -> list[TokenizedExample]:
    """A source with two targets, and one with a single target."""
    source, other, *targets = (tuple(ids) for ids in subject.ids(4, 1, 5, 3, 4))
    return [TokenizedExample(source, tuple(targets[:2])), TokenizedExample(other, (targets[2],))]


def _compare_losses(subject: Subject, examples: Sequence[TokenizedExample], batch: Batch) -> Finding:
    """A batch as training makes it against every pair alone: losses, and in float32 the prefix's gradient."""
    backbone = subject.backbone
    leaf = subject.first.to(backbone.dtype).leaves()
    with torch.enable_grad():
        losses = batch_loss(backbone, leaf, batch)
        reference = torch.cat(
            [
                token_losses(
                    recomputed(backbone, example.prompt, target, leaf),
                    torch.tensor(target, device=backbone.device),
                )
                for example in examples
                for target in example.targets
            ]
        )
        distance = subject.distance([losses], [reference])
        what = f"losses of {len(losses)} tokens"
        if subject.exact:
            ones, others = (torch.autograd.grad(one.sum(), leaf.tensors()) for one in (losses, reference))
            distance = max(distance, subject.distance(ones, others))
            what += " and their gradients"
    return subject.same(what, distance)


def check_packing(subject: Subject) -> Finding:
    """A packed row gives the losses and gradients of its texts alone."""
    backbone = subject.backbone
    if not backbone.layout.packable or backbone.kind == "encoder":
        return None
    examples = _examples(subject)
    start = backbone.decoder_start_id if backbone.kind == "encoder-decoder" else None
    return _compare_losses(subject, examples, pack(examples, decoder_start_id=start))


def check_padded_pairs(subject: Subject) -> Finding:
    """Padded pairs give the losses and gradients of each pair alone."""
    backbone = subject.backbone
    if backbone.kind == "encoder":
        return None
    examples = _examples(subject)
    start = backbone.decoder_start_id if backbone.kind == "encoder-decoder" else None
    return _compare_losses(subject, examples, pad(examples, pad_id=backbone.pad_id, decoder_start_id=start))


def check_labelled(subject: Subject) -> Finding:
    """The hidden states that a head reads, in a batch as training makes it, against each text's alone."""
    backbone = subject.backbone
    if backbone.kind == "encoder-decoder":
        return None
    rows = subject.ids(4, 6, 9)
    batch = collate(
        backbone, [TokenizedExample(tuple(row), ((0,) * len(row),), tuple(range(len(row)))) for row in rows]
    )
    hidden = backbone.hidden_states(**batch.inputs(backbone.device), prefixes=subject.first)
    found = hidden.flatten(0, 1)[batch.label_positions.to(backbone.device)]
    reference = [
        backbone.hidden_states(torch.tensor([row], device=backbone.device), prefixes=subject.first)[0] for row in rows
    ]
    return subject.same(f"hidden states of {len(rows)} texts", subject.distance([found], [torch.cat(reference)]))
