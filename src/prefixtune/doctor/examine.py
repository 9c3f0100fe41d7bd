"""The self-check: does this backbone, in this installation, really use prefixes, everywhere and exactly?

A prefix that is ignored raises no error: training goes on, text comes out. So every way of using one is run here on the
real model with random prefixes, and compared with the plainest way: one unpadded row, computed in full, no cache.

Whether a prefix takes part is seen where it stands: in what the attention layer itself gives. The change must exceed
the float noise, which is measured there: the same run twice, and the same row in a batch.

In float32 the largest difference is compared, relative to the largest number of the reference, and decoded tokens must
be the same. In bfloat16 and float16 the root mean square of the differences is, relative to the reference's, since
single numbers stray far by rounding; decoded tokens are not compared, since near ties may flip, but the scores of the
very tokens that were chosen. The bounds are wider there, so that a fault of a single layer may hide below them; and a
token that rounding sends to another expert may exceed them. Run in float32 to be sure.

Checks that a model gives no occasion for are left out: generation, where it is an encoder; single sites, where it has
one; packed rows and a prefilled cache, where it allows none; a head, where none is trained on it; sliding windows,
where no layer has one, or where it is too long to be tried (over 512 positions, or over what the model allows);
gradient checkpointing, where the model has none or the prefix travels beside the call; transformers' own attention,
which rounds otherwise, in half precision.

Knows nothing of files, consoles or training runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from prefixtune.attention.compute import prefix_from_tokens
from prefixtune.attention.injection import trace_calls
from prefixtune.backbone.backbone import Backbone
from prefixtune.doctor.attention_checks import (
    check_causality,
    check_checkpointing,
    check_evaluation_mode,
    check_gradients,
    check_layers,
    check_order,
    check_own_attention,
    check_registry,
    check_single_sites,
    check_untouched,
    quickly,
)
from prefixtune.doctor.batch_checks import (
    check_batch,
    check_labelled,
    check_mixed,
    check_packing,
    check_padded_pairs,
    check_padding,
    check_routes,
)
from prefixtune.doctor.decoding_checks import check_beams, check_greedy, check_in_generation, check_sliding_window
from prefixtune.doctor.reference import Text, attended, continued, distance, outputs, replaced, strengthened
from prefixtune.doctor.state import State
from prefixtune.doctor.subject import LONGER, Finding, Subject, draw
from prefixtune.errors import BackboneError, ConfigError
from prefixtune.prefix.geometry import Site
from prefixtune.prefix.prefix import Prefix

__all__ = ["CHECKS", "Check", "examine"]


_STRENGTHS = (1.0, 4.0, 16.0)
"""What the prefixes' values are multiplied by, until every layer's prefix shows where it stands and in the outputs."""
_ABOVE_NOISE = 10.0
"""How many times the float noise a change must be."""
_ROOM = 24
"""Positions that the longest of the short texts here and its continuation may take, and some more."""

_TOLERANCES = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Half-precision dtype -> how far apart equal things may be."""
_FLOAT32_TOLERANCE = 1e-4
_SHOWN = {torch.bfloat16: 4e-3}
"""Dtype -> the change of the outputs up to which prefixes are strengthened, where it is not `_SHOWN_ELSE`."""
_SHOWN_ELSE = 1e-3


@dataclass(frozen=True)
class Check:
    """One thing that was verified.

    Attributes:
        name: What should hold, as a sentence.
        passed: Whether it does.
        detail: The figure that was measured and its bound, or the error.
    """

    name: str
    passed: bool
    detail: str


def examine(
    backbone: Backbone,
    *,
    prefix_length: int = 5,
    seed: int = 0,
    on_check: Callable[[Check], None] | None = None,
) -> list[Check]:
    """Verify that prefixes work on a backbone, whichever way they are used.

    A check that raises has failed, with the error as its detail. Where no prefix can be made at all, the first check
    says so and is the only one. Random states and the backbone are left as they were.

    Args:
        backbone: Any backbone, of any kind and in any dtype.
        prefix_length: P, of the shorter of the two random prefixes.
        seed: Of prefixes and texts.
        on_check: Told of every check as soon as it is done.

    Returns:
        All checks, in the order of their doing.

    Raises:
        ConfigError: The prefix length is below 1 or leaves no room for text.
    """
    limit = backbone.max_positions
    # Prefixes are recorded from texts of their length, which must fit even where a prefix takes no position.
    longest = None if limit is None else limit - LONGER - (_ROOM if backbone.prefix_positions(1) else 0)
    if prefix_length < 1 or (longest is not None and prefix_length > longest):
        allowed = "at least 1" if longest is None else f"between 1 and {longest}"
        raise ConfigError(f"prefix_length is {prefix_length}, but must be {allowed}.", hint="5 is a good choice.")
    checks: list[Check] = []

    def note(name: str, run: Callable[[], Finding]) -> None:
        try:
            finding = run()
        except Exception as error:
            finding = False, _one_line(error)
        if finding is not None:
            checks.append(Check(name, *finding))
            if on_check is not None:
                on_check(checks[-1])

    devices = [backbone.device] if backbone.device.type == "cuda" else []
    modes = [(module, module.training) for module in backbone.model.modules()]
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        try:
            subject = _prepare(backbone, prefix_length, seed)
        except Exception as error:
            detail = _one_line(error)
            note(CHECKS[0][0], lambda: (False, detail))
            return checks
        try:
            for name, check in CHECKS:
                note(name, lambda check=check: check(subject))  # type: ignore[misc]
        finally:
            for module, mode in modes:
                module.training = mode
    return checks


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# --- random prefixes, strong enough to matter ------------------------------------------------------------------------


def _prepare(backbone: Backbone, prefix_length: int, seed: int) -> Subject:
    """Record two prefixes from random tokens, and strengthen them until every layer's part shows.

    Raises:
        BackboneError: Not every layer that was found at loading attends through the registry now.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(int(backbone.model.get_input_embeddings().weight.shape[0]), len(backbone.tokenizer))
    special = set(backbone.tokenizer.all_special_ids)
    vocabulary = torch.tensor([n for n in range(size) if n not in special])
    before = State.of(backbone.model)
    row = draw(vocabulary, 8, generator)
    text = continued(backbone, row, row[::-1]) if backbone.kind == "encoder-decoder" else Text(row)
    _check_registry(backbone, text)

    def recorded(length: int) -> Prefix:
        ids = torch.tensor([draw(vocabulary, length, generator)], device=backbone.device)
        return prefix_from_tokens(backbone.model, backbone.layout, ids).to(device=backbone.device)

    first, second, other = (recorded(length) for length in (prefix_length, prefix_length + LONGER, prefix_length))
    for strength in _STRENGTHS:
        # Values of the opposite sign: those of two texts may be much the same.
        strong, replacement = strengthened(first, strength), strengthened(other, -strength)
        effects = _effects(backbone, text, strong, replacement)
        if effects.shown:
            break
    return Subject(
        backbone,
        _TOLERANCES.get(backbone.dtype, _FLOAT32_TOLERANCE),
        effects.outputs_bound,
        strong,
        strengthened(second, strength),
        effects.layers,
        effects.bounds,
        strength,
        vocabulary,
        generator,
        before,
    )


@dataclass(frozen=True)
class _Effects:
    """What replacing one layer's prefix by another changes.

    Attributes:
        layers: Site and number of a layer -> the change of what that layer gives.
        bounds: The same -> how large it must be: so many times the float noise there.
        outputs_bound: How large a change of the model's outputs must be.
        shown: Whether every layer's change is that large, and shows in the model's outputs.
    """

    layers: dict[tuple[Site, int], float]
    bounds: dict[tuple[Site, int], float]
    outputs_bound: float
    shown: bool


def _effects(backbone: Backbone, text: Text, prefix: Prefix, replacement: Prefix) -> _Effects:
    """Replace one layer's prefix after the other, and compare with the float noise."""

    def apart(one: torch.Tensor, other: torch.Tensor) -> float:
        return distance([one], [other], backbone.dtype)

    whole, final = attended(backbone, [text], [prefix]), outputs(backbone, [text], [prefix])[0]
    noise, final_noise = dict.fromkeys(whole, 0.0), 0.0
    for count in (1, 2):
        rows, prefixes = [text] * count, [prefix] * count
        again = attended(backbone, rows, prefixes)
        noise = {place: max(noise[place], apart(again[place], one)) for place, one in whole.items()}
        final_noise = max(final_noise, apart(outputs(backbone, rows, prefixes)[0], final))
    layers, in_outputs = {}, []
    for site, number in whole:
        changed = replaced(prefix, replacement, site, number)
        layers[site, number] = apart(attended(backbone, [text], [changed])[site, number], whole[site, number])
        in_outputs.append(apart(outputs(backbone, [text], [changed])[0], final))
    least = float(torch.finfo(backbone.dtype).eps)
    bounds = {place: max(_ABOVE_NOISE * each, least) for place, each in noise.items()}
    shown = min(in_outputs) >= _SHOWN.get(backbone.dtype, _SHOWN_ELSE)
    return _Effects(
        layers,
        bounds,
        max(_ABOVE_NOISE * final_noise, least),
        shown and all(layers[place] >= bounds[place] for place in layers),
    )


def _check_registry(backbone: Backbone, text: Text) -> None:
    with trace_calls() as calls:
        outputs(backbone, [text], [None])
    reached = {call.module for call in calls if call.carried or not backbone.layout.forwards_kwargs}
    missing = backbone.layout.layer_of.keys() - reached
    if missing:
        every = "no" if len(missing) == len(backbone.layout.layer_of) else "not every"
        raise BackboneError(f"{every} layer attends through transformers' registry, as it did when it was loaded.")


CHECKS: tuple[tuple[str, Callable[[Subject], Finding]], ...] = (
    ("every layer attends through the registry", check_registry),
    ("the self-check of loading passes", quickly),
    ("no prefix = transformers' own attention", check_own_attention),
    ("every layer receives the prefix", check_layers),
    ("every prefix slot receives a gradient", check_gradients),
    ("each site works alone", check_single_sites),
    ("the order of prefix positions is free", check_order),
    ("no token sees a later one", check_causality),
    ("injected = prefilled", check_routes),
    ("padded = unpadded", check_padding),
    ("batch = single", check_batch),
    ("mixed prefixes = one by one", check_mixed),
    ("packed = one pair at a time", check_packing),
    ("padded pairs = one pair at a time", check_padded_pairs),
    ("labelled texts = one at a time", check_labelled),
    ("generation uses the prefix", check_in_generation),
    ("cached decoding = full recomputation", check_greedy),
    ("beam search = full recomputation", check_beams),
    ("sliding windows keep the prefix", check_sliding_window),
    ("dropout stays off in training mode", check_evaluation_mode),
    ("gradient checkpointing changes nothing", check_checkpointing),
    ("the backbone is untouched", check_untouched),
)
