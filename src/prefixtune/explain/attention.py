"""How much of the attention goes to the prefix: by layer and position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prefixtune.attention.injection import observe_attention
from prefixtune.attention.record import PrefixMass
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.batch import Batch
from prefixtune.data.batching import collate
from prefixtune.explain.subject import Subject, View
from prefixtune.prefix.geometry import Site
from prefixtune.prefix.prefix import Prefix


def attention_view(subject: Subject) -> View:
    """Attention mass of the prefix and of its controls."""
    mass = prefix_mass(subject, subject.prefix)
    if not mass:
        why = f"the attention of {type(subject.backbone.model).__name__} computes its weights itself, unseen from here."
        return View("attention", left_out=why)
    controls = {name: _describe(prefix_mass(subject, control)) for name, control in subject.controls.items()}
    return View("attention", {"rows": len(subject.tokenized), "sites": _describe(mass), "controls": controls})


@torch.no_grad()
def prefix_mass(subject: Subject, prefix: Prefix) -> Mapping[Site, list[Float[Tensor, "Hq P"]]]:
    """Each position's mean share of the attention of the queries that predict the labels, by site, layer and head.

    At an encoder, all tokens of the sources count.
    """
    mass = PrefixMass({})
    prefix, size = prefix.to(device=subject.backbone.device), subject.batch_size
    for first in range(0, len(subject.tokenized), size):
        batch = collate(subject.backbone, subject.tokenized[first : first + size])
        mass.counted = _counted(subject.backbone, batch)
        with observe_attention(mass.add):
            subject.backbone.hidden_states(**batch.inputs(subject.backbone.device), prefixes=prefix)
    return mass.mean()


def _counted(backbone: Backbone, batch: Batch) -> dict[Site, Bool[Tensor, "_B _T"]]:
    """Which queries of a batch count, by site."""
    rows = batch.input_ids if batch.decoder_input_ids is None else batch.decoder_input_ids
    labels = torch.zeros(rows.numel(), dtype=torch.bool)
    labels[batch.label_positions] = True
    predicting = labels.view_as(rows)
    read = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
    if backbone.kind == "encoder":
        return {"encoder": read.bool()}
    return {"decoder": predicting, "cross": predicting, "encoder": read.bool()}


def _describe(mass: Mapping[Site, list[Float[Tensor, "Hq P"]]]) -> dict[str, Any]:
    """The means over heads, by site."""
    shares = {site: torch.stack([layer.mean(0) for layer in layers]) for site, layers in mass.items()}
    return {
        site: {
            "total": float(matrix.sum(1).mean()),
            "total_without_first": float(matrix[:, 1:].sum(1).mean()),
            "by_layer_and_position": matrix.tolist(),
        }
        for site, matrix in shares.items()
    }
