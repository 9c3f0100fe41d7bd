"""What two prefixes share, layer by layer, and how far a prefix is from its start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.explain.subject import Subject
from prefixtune.explain.view import View
from prefixtune.prefix.geometry import Site
from prefixtune.prefix.prefix import Prefix

__all__ = ["cka", "likeness_view", "start_view", "subspace_overlap"]


def likeness_view(subject: Subject) -> View:
    """What the prefix shares with its controls."""
    others = subject.controls
    numbers = {"with": {name: compare(subject.prefix, other) for name, other in others.items()}}
    note = "No other prefix is given (--against FILE): it is compared with controls made of itself."
    return View("likeness", numbers, () if "other" in others else (note,))


def start_view(subject: Subject) -> View:
    """How far each layer and position is from where training began; the controls' distances beside it."""
    if subject.start is None:
        return View("start", left_out=subject.start_note)
    numbers: dict[str, Any] = {"start": subject.start_note, **_distances(subject.prefix, subject.start)}
    same_lengths = {name: other for name, other in subject.controls.items() if other.lengths == subject.prefix.lengths}
    numbers["controls"] = {
        name: {key: _distances(other, subject.start)[key] for key in ("keys", "values")}
        for name, other in same_lengths.items()
    }
    return View("start", numbers)


def compare(one: Prefix, other: Prefix) -> dict[str, Any]:
    """Likeness of two prefixes by site: per layer, and the mean over layers; of keys and of values."""
    return {
        site: {
            "keys": _compare_layers(_rows(one, site, 0), _rows(other, site, 0)),
            "values": _compare_layers(_rows(one, site, 1), _rows(other, site, 1)),
        }
        for site in one.sites
        if site in other.sites
    }


def _rows(prefix: Prefix, site: Site, part: int) -> list[Float[Tensor, "_H _P _D"]]:
    return [pair[part].float() for pair in prefix.layers[site]]


def _compare_layers(ones: list[Tensor], others: list[Tensor]) -> dict[str, Any]:
    """Per layer: cosine of the same positions, linear CKA over them, and the overlap of the heads' subspaces."""
    layers: dict[str, list[float]] = {"cosine": [], "cka": [], "overlap": [], "overlap_by_chance": []}
    for one, other in zip(ones, others, strict=True):
        shared = min(one.shape[1], other.shape[1])
        a, b = (x[:, :shared].transpose(0, 1).flatten(1) for x in (one, other))
        layers["cosine"].append(float(torch.nn.functional.cosine_similarity(a, b).mean()))
        layers["cka"].append(cka(a, b))
        overlaps = [subspace_overlap(x, y) for x, y in zip(one, other, strict=True)]
        layers["overlap"].append(sum(overlaps) / len(overlaps))
        layers["overlap_by_chance"].append(min(1.0, max(one.shape[1], other.shape[1]) / one.shape[2]))
    means = {name: sum(values) / len(values) for name, values in layers.items()}
    return {**means, "by_layer": {name: values for name, values in layers.items() if name != "overlap_by_chance"}}


def cka(one: Float[Tensor, "P A"], other: Float[Tensor, "P B"]) -> float:
    """Linear CKA (Kornblith et al. 2019): how alike the positions' distances from each other are; 0 to 1.

    It is the same after any rotation of either side. 0 where one side has no spread.
    """
    a, b = (x.double() - x.double().mean(0) for x in (one, other))
    grams = [x @ x.T for x in (a, b)]
    norms = [float(gram.norm()) for gram in grams]
    if min(norms) < 1e-12:
        return 0.0
    return float((grams[0] * grams[1]).sum()) / (norms[0] * norms[1])


def subspace_overlap(one: Float[Tensor, "P D"], other: Float[Tensor, "Q D"]) -> float:
    """The mean squared cosine of the principal angles between two spans of positions; 0 to 1.

    Two random spans of dimensions p <= q in D overlap by q / D.
    """
    bases = [_basis(x.double()) for x in (one, other)]
    smallest = min(basis.shape[1] for basis in bases)
    if not smallest:
        return 0.0
    return float((bases[0].T @ bases[1]).square().sum()) / smallest


def _basis(rows: Float[Tensor, "P D"]) -> Float[Tensor, "D _r"]:
    """An orthonormal basis of the rows' span."""
    _, singular, right = torch.linalg.svd(rows, full_matrices=False)
    rank = int((singular > 1e-6 * singular.max().clamp(min=1e-30)).sum())
    basis: Tensor = right[:rank].T
    return basis


def _distances(prefix: Prefix, start: Prefix) -> dict[str, Any]:
    """Of keys and values: how far from the start, relative to the start's length, and the cosine with it."""
    found: dict[str, Any] = {}
    for name, part in (("keys", 0), ("values", 1)):
        sites: Mapping[Site, Any] = {
            site: _site_distances(_rows(prefix, site, part), _rows(start, site, part)) for site in prefix.sites
        }
        found[name] = sites
    return found


def _site_distances(ones: list[Tensor], starts: list[Tensor]) -> dict[str, Any]:
    layers, cosines, positions = [], [], []
    for one, start in zip(ones, starts, strict=True):
        a, b = (x.transpose(0, 1).flatten(1) for x in (one, start))
        moved = (a - b).norm(dim=1) / b.norm(dim=1).clamp(min=1e-12)
        positions.append(moved)
        layers.append(float((a - b).norm() / b.norm().clamp(min=1e-12)))
        cosines.append(float(torch.nn.functional.cosine_similarity(a, b).mean()))
    return {
        "moved": sum(layers) / len(layers),
        "cosine": sum(cosines) / len(cosines),
        "by_layer": layers,
        "by_position": torch.stack(positions).mean(0).tolist(),
    }
