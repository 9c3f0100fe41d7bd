"""Checks of attention: does a prefix reach every layer, also where layers are recomputed?"""

from __future__ import annotations

import math

from prefixtune.attention.forward import gradient_checkpointing
from prefixtune.backbone import selfcheck
from prefixtune.doctor.reference import (
    compute_outputs,
    outputs_one_by_one,
    prefix_gradients,
    slot_gradients,
)
from prefixtune.doctor.subject import CheckResult, Subject
from prefixtune.prefix.geometry import Site

__all__ = [
    "check_checkpointing",
    "check_evaluation_mode",
    "check_gradients",
    "check_layers",
    "check_loading",
    "check_own_attention",
    "check_registry",
]


# --- where prefixes reach --------------------------------------------------------------------------------------------


def check_registry(subject: Subject) -> CheckResult:
    """Every layer attends through the registry; otherwise there would be no subject."""
    geometry = subject.backbone.geometry
    counts = [f"{len(shapes)} of {len(shapes)} {site} layers" for site, shapes in geometry.items()]
    return True, ", ".join(counts)


def check_loading(subject: Subject) -> CheckResult:
    """The self-check of `load_backbone`, with its figures."""
    result = selfcheck.compare(subject.backbone.model, subject.backbone.layout)
    detail = (
        f"{subject.output_name} differ by {result.difference:.1e} (at most {result.bound:g}); "
        f"effect {result.effect:.1e}"
    )
    return result.passed, detail + ("" if result.differentiable else "; no gradient reaches it in some layer")


def check_own_attention(subject: Subject) -> CheckResult:
    """Without a prefix, the attention here equals transformers' own."""
    backbone = subject.backbone
    if not subject.is_exact:
        # The two round scores differently, which half precision shows.
        return None
    rows, prefixes = subject.texts(6, 9), [None, None]
    ours = compute_outputs(backbone, rows, prefixes)
    # Restored by hand in every submodule: transformers may refuse to restore what it has set itself.
    configs = {id(m.config): m.config for m in backbone.model.modules() if hasattr(m, "config")}.values()
    implementations = [(config, config._attn_implementation) for config in configs]
    try:
        backbone.model.set_attn_implementation("eager")
        theirs = compute_outputs(backbone, rows, prefixes)
    finally:
        for config, name in implementations:
            config._attn_implementation = name
    return subject.check_equal(f"{subject.output_name} of 2 rows", subject.difference(ours, theirs))


def check_layers(subject: Subject) -> CheckResult:
    """Replacing one layer's prefix changes that layer's output."""
    effects, bounds = subject.layer_effects, subject.layer_bounds
    weak = [layer for layer, effect in effects.items() if not bounds[layer] <= effect < math.inf]
    weakest = min(effects, key=lambda layer: effects[layer] / bounds[layer])
    detail = (
        f"replacing one layer's prefix changes that layer's output by {effects[weakest]:.1e} or more "
        f"(layer {_layer_name(subject, weakest)}; at least {bounds[weakest]:.1e}, by the float noise; "
        f"strength {subject.strength:g})"
    )
    names = ", ".join(_layer_name(subject, layer) for layer in weak)
    return not weak, detail + (f"; too little in layers {names}" if weak else "")


def _layer_name(subject: Subject, layer: tuple[Site, int]) -> str:
    site, index = layer
    return str(index) if len(subject.sites) == 1 else f"{site} {index}"


def check_gradients(subject: Subject) -> CheckResult:
    """Every key and value slot of the prefix gets a gradient."""
    backbone = subject.backbone
    # A pass without gradients must leave nothing behind.
    outputs_one_by_one(backbone, subject.texts(4), [subject.first])
    _, gradients = prefix_gradients(backbone, subject.texts(6, 9), [subject.first, subject.second])
    is_finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
    slots = slot_gradients(gradients)
    num_dead = int((slots == 0).sum())
    detail = (
        f"{len(slots) - num_dead} of {len(slots)} key and value slots of all layers, in a padded batch "
        f"(the weakest gets {float(slots.min()):.1e}; above 0)"
    )
    return is_finite and not num_dead, detail + ("" if is_finite else "; some are not finite")


# --- modes -----------------------------------------------------------------------------------------------------------


def check_evaluation_mode(subject: Subject) -> CheckResult:
    """`.train()` turns no dropout on."""
    backbone = subject.backbone
    modes = [(module, module.training) for module in backbone.model.modules()]
    num_training = sum(mode for _, mode in modes)
    rows, prefixes = subject.texts(8), [subject.first]
    reference = outputs_one_by_one(backbone, rows, prefixes)
    try:
        backbone.model.train()
        difference = max(subject.difference(outputs_one_by_one(backbone, rows, prefixes), reference) for _ in range(2))
    finally:
        for module, mode in modes:
            module.training = mode
    passed, detail = subject.check_equal(f"{subject.output_name} after .train()", difference)
    return not num_training and passed, detail + (
        f"; {num_training} modules are in training mode" if num_training else ""
    )


def check_checkpointing(subject: Subject) -> CheckResult:
    """Gradient checkpointing changes neither outputs nor gradients."""
    backbone = subject.backbone
    if not backbone.layout.forwards_kwargs or not getattr(backbone.model, "supports_gradient_checkpointing", False):
        return None
    rows, prefixes = subject.texts(6, 9), [subject.first, subject.second]
    reference, gradients = prefix_gradients(backbone, rows, prefixes)
    with gradient_checkpointing(backbone.model):
        outputs, other_gradients = prefix_gradients(backbone, rows, prefixes)
    difference = max(subject.difference(outputs, reference), subject.difference(other_gradients, gradients))
    return subject.check_equal(f"{subject.output_name} and gradients", difference)
