"""What should hold of a backbone with prefixes, one function per check: the list that the doctor goes through.

Each runs prefixes in one way and compares with the plainest (see `trial`). It returns whether its sentence holds, with
the figures; or None, where the model gives no occasion for it.

Knows nothing of how the subject was prepared and of who is told.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prefixtune.attention.forward import gradient_checkpointing
from prefixtune.backbone import selfcheck
from prefixtune.doctor.reference import Text, alone, attended, only, outputs, prefix_gradients
from prefixtune.doctor.state import State
from prefixtune.doctor.subject import Finding, Subject
from prefixtune.prefix.geometry import Site
from prefixtune.prefix.prefix import Prefix

__all__ = ["INFINITE", "quickly"]

INFINITE = float("inf")


# --- where prefixes reach --------------------------------------------------------------------------------------------


def check_registry(subject: Subject) -> Finding:
    # Its preparation would have failed otherwise.
    geometry = subject.backbone.geometry
    counts = [f"{len(shapes)} of {len(shapes)} {site} layers" for site, shapes in geometry.items()]
    return True, ", ".join(counts)


def quickly(subject: Subject) -> Finding:
    """What `load_backbone` checks, with its figures."""
    found = selfcheck.compare(subject.backbone.model, subject.backbone.layout)
    detail = f"{subject.outputs} differ by {found.difference:.1e} (at most {found.bound:g}); effect {found.effect:.1e}"
    return found.passed, detail + ("" if found.differentiable else "; no gradient reaches it in some layer")


def check_own_attention(subject: Subject) -> Finding:
    backbone = subject.backbone
    if not subject.exact:
        # The two round scores differently, which half precision shows.
        return None
    rows, prefixes = subject.texts(6, 9), [None, None]
    ours = outputs(backbone, rows, prefixes)
    # Of every part: transformers may refuse to set a part back that it has set.
    configs = {id(m.config): m.config for m in backbone.model.modules() if hasattr(m, "config")}.values()
    chosen = [(config, config._attn_implementation) for config in configs]
    try:
        backbone.model.set_attn_implementation("eager")
        theirs = outputs(backbone, rows, prefixes)
    finally:
        for config, name in chosen:
            config._attn_implementation = name
    return subject.same(f"{subject.outputs} of 2 rows", subject.distance(ours, theirs))


def check_layers(subject: Subject) -> Finding:
    dead, weakest = _too_weak(subject, subject.layer_effects)
    detail = (
        f"replacing one layer's prefix moves what that layer gives by {subject.layer_effects[weakest]:.1e} or more "
        f"(layer {_layer_name(subject, weakest)}; at least {subject.layer_bounds[weakest]:.1e}, by the float noise; "
        f"strength {subject.strength:g})"
    )
    words = ", ".join(_layer_name(subject, place) for place in dead)
    return not dead, detail + (f"; too little in layers {words}" if dead else "")


def _too_weak(
    subject: Subject, effects: dict[tuple[Site, int], float]
) -> tuple[list[tuple[Site, int]], tuple[Site, int]]:
    """The layers whose change does not exceed the float noise, and the one that is nearest to it."""
    bounds = subject.layer_bounds
    dead = [place for place, effect in effects.items() if not bounds[place] <= effect < INFINITE]
    return dead, min(effects, key=lambda place: effects[place] / bounds[place])


def _layer_name(subject: Subject, place: tuple[Site, int]) -> str:
    return str(place[1]) if len(subject.sites) == 1 else f"{place[0]} {place[1]}"


def slot_gradients(gradients: Sequence[Tensor]) -> Tensor:
    """The largest gradient of every key and value slot of all layers."""
    return torch.cat([gradient.float().abs().amax(dim=(0, 2)) for gradient in gradients])


def check_gradients(subject: Subject) -> Finding:
    backbone = subject.backbone
    # A pass without gradients must leave nothing behind.
    alone(backbone, subject.texts(4), [subject.first])
    _, gradients = prefix_gradients(backbone, subject.texts(6, 9), [subject.first, subject.second])
    finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
    largest = slot_gradients(gradients)
    dead = int((largest == 0).sum())
    detail = (
        f"{len(largest) - dead} of {len(largest)} key and value slots of all layers, in a padded batch "
        f"(the weakest gets {float(largest.min()):.1e}; above 0)"
    )
    return finite and not dead, detail + ("" if finite else "; some are not finite")


def check_single_sites(subject: Subject) -> Finding:
    if len(subject.sites) == 1:
        return None
    backbone = subject.backbone
    rows = subject.texts(6)
    bare = attended(backbone, rows, [None])
    words, passed = [], True
    for site in subject.sites:
        prefix = only(subject.first, site)
        _, gradients = prefix_gradients(backbone, rows, [prefix])
        found = attended(backbone, rows, [prefix])
        effects = {place: subject.distance([found[place]], [bare[place]]) for place in bare if place[0] == site}
        dead, weakest = _too_weak(subject, effects)
        slots = slot_gradients(gradients)
        live = int((slots > 0).sum())
        passed = passed and not dead and live == len(slots)
        bound = subject.layer_bounds[weakest]
        words.append(f"{site} {effects[weakest]:.1e}, {live} of {len(slots)} slots (at least {bound:.1e}, all)")
    return passed, f"alone it moves what its layers give by: {'; '.join(words)}"


def check_order(subject: Subject) -> Finding:
    backbone, prefix = subject.backbone, subject.first
    turned = Prefix({site: tuple((k.flip(1), v.flip(1)) for k, v in layers) for site, layers in prefix.layers.items()})
    one, other = alone(backbone, subject.texts(6) * 2, [prefix, turned])
    return subject.same(f"{subject.outputs} with the prefix back to front", subject.distance([other], [one]))


def check_causality(subject: Subject) -> Finding:
    backbone = subject.backbone
    if backbone.kind == "encoder":
        return None
    (text,) = subject.texts(8)
    row = text.target or text.ids
    spare = next(int(n) for n in subject.vocabulary if int(n) != row[-1])
    changed = [*row[:-1], spare]
    other = Text(text.ids, changed) if text.target else Text(changed)
    before, after = alone(backbone, [text, other], [subject.first] * 2)
    return subject.same("logits before a changed token", subject.distance([after[:-1]], [before[:-1]]))


# --- modes, and what stays -------------------------------------------------------------------------------------------


def check_evaluation_mode(subject: Subject) -> Finding:
    backbone = subject.backbone
    modes = [(module, module.training) for module in backbone.model.modules()]
    training = sum(mode for _, mode in modes)
    rows, prefixes = subject.texts(8), [subject.first]
    reference = alone(backbone, rows, prefixes)
    try:
        backbone.model.train()
        distance = max(subject.distance(alone(backbone, rows, prefixes), reference) for _ in range(2))
    finally:
        for module, mode in modes:
            module.training = mode
    passed, detail = subject.same(f"{subject.outputs} after .train()", distance)
    return passed and not training, detail + (f"; {training} modules are in training mode" if training else "")


def check_checkpointing(subject: Subject) -> Finding:
    backbone = subject.backbone
    if not backbone.layout.forwards_kwargs or not getattr(backbone.model, "supports_gradient_checkpointing", False):
        return None
    rows, prefixes = subject.texts(6, 9), [subject.first, subject.second]
    reference, gradients = prefix_gradients(backbone, rows, prefixes)
    with gradient_checkpointing(backbone.model):
        others, other_gradients = prefix_gradients(backbone, rows, prefixes)
    distance = max(subject.distance(others, reference), subject.distance(other_gradients, gradients))
    return subject.same(f"{subject.outputs} and gradients", distance)


def check_untouched(subject: Subject) -> Finding:
    changes = subject.before.changes(State.of(subject.backbone.model))
    count = len(subject.before.tensors)
    if changes:
        return False, f"{len(changes)} changed (at most 0): {', '.join(changes[:3])}"
    return True, f"{count} of {count} parameters and buffers are bit for bit the same; no hook or attribute is left"
