"""Runs all checks on a backbone: does it, in this installation, use prefixes everywhere and exactly?

A prefix that is ignored raises no error: training goes on, text comes out. So every way of using a prefix is run on the
real model with random prefixes, and compared with the plainest way: one unpadded row, computed in full, without a
cache.

A prefix's effect is measured in the output of the attention layer itself. It must exceed the float noise, which is
measured in the same output: by a second run of the same row, and by the same row in a batch.

In float32, the largest difference counts, relative to the largest number of the reference, and decoded tokens must be
the same. Gradients of a large vocabulary's losses may differ by more, up to the rounding of a sum over it. In bfloat16
and float16, the root mean square of the differences counts, relative to the reference's, because rounding moves single
numbers far. Decoded tokens are not compared there, because near ties may flip, but the scores of the chosen tokens are.
The bounds are wider in half precision: a fault in a single layer may stay below them, and a token that rounding sends
to another expert may exceed them. Use float32 to be sure.

Checks that do not apply to a model are left out: generation, for an encoder; packed rows and a prefilled cache, where
the model allows none; sliding windows, where no layer has one, or where it is too long to be tried (over 512 positions,
or more than the model allows); gradient checkpointing, where the model has none or does not pass the prefix on; and, in
half precision, transformers' own attention, which rounds differently.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import BackboneLike, as_backbone
from prefixtune.doctor.attention_checks import (
    check_checkpointing,
    check_evaluation_mode,
    check_gradients,
    check_layers,
    check_loading,
    check_own_attention,
    check_registry,
)
from prefixtune.doctor.batch_checks import (
    check_mixed,
    check_packing,
    check_padding,
    check_routes,
)
from prefixtune.doctor.decoding_checks import check_greedy, check_in_generation, check_sliding_window
from prefixtune.doctor.prepare import prepare
from prefixtune.doctor.subject import EXTRA_POSITIONS, CheckResult, Subject
from prefixtune.errors import ConfigError

__all__ = ["CHECKS", "Check", "examine"]


_ROOM = 24
"""Positions for the longest of the short texts here and its continuation, and some more."""


@dataclass(frozen=True)
class Check:
    """One thing that was verified.

    Attributes:
        name: What should be true, in a few words.
        passed: Whether it is.
        detail: The measured figure and its bound, or the error.
    """

    name: str
    passed: bool
    detail: str


def examine(
    backbone: BackboneLike,
    *,
    prefix_length: int = 5,
    seed: int = 0,
    on_check: Callable[[Check], None] | None = None,
) -> list[Check]:
    """Verify that prefixes work on a backbone, in every way they are used.

    A check that raises has failed, with the error as its detail. Where no prefix can be made at all, only the first
    check is reported, as failed. The random states and the backbone are left unchanged.

    Args:
        backbone: Any backbone, of any kind and in any dtype; or what `load_backbone` takes.
        prefix_length: P, of the shorter of the two random prefixes.
        seed: For prefixes and texts.
        on_check: Called with every check as soon as it is done.

    Returns:
        All checks that apply, in order.

    Raises:
        ConfigError: The prefix length is below 1 or leaves no room for text.
        PrefixError: As `load_backbone`.
    """
    backbone = as_backbone(backbone)
    _check_prefix_length(backbone, prefix_length)
    checks: list[Check] = []

    def report(name: str, run: Callable[[], CheckResult]) -> None:
        try:
            result = run()
        except Exception as error:
            result = False, _one_line(error)
        if result is not None:
            checks.append(Check(name, *result))
            if on_check is not None:
                on_check(checks[-1])

    devices = [backbone.device] if backbone.device.type == "cuda" else []
    modes = [(module, module.training) for module in backbone.model.modules()]
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        try:
            subject = prepare(backbone, prefix_length, seed)
        except Exception as error:
            detail = _one_line(error)
            report(CHECKS[0][0], lambda: (False, detail))
            return checks
        try:
            for name, check in CHECKS:
                report(name, functools.partial(check, subject))
        finally:
            for module, mode in modes:
                module.training = mode
    return checks


def _check_prefix_length(backbone: Backbone, prefix_length: int) -> None:
    limit = backbone.max_positions
    # Prefixes are computed from texts of their length, which must fit even where a prefix takes no position.
    longest = None if limit is None else limit - EXTRA_POSITIONS - (_ROOM if backbone.prefix_positions(1) else 0)
    if prefix_length < 1 or (longest is not None and prefix_length > longest):
        allowed = "at least 1" if longest is None else f"between 1 and {longest}"
        raise ConfigError(f"prefix_length is {prefix_length}, but must be {allowed}.", hint="5 is a good choice.")


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


CHECKS: tuple[tuple[str, Callable[[Subject], CheckResult]], ...] = (
    ("every layer attends through the registry", check_registry),
    ("the self-check of loading passes", check_loading),
    ("no prefix = transformers' own attention", check_own_attention),
    ("every layer receives the prefix", check_layers),
    ("every prefix slot receives a gradient", check_gradients),
    ("injected = prefilled", check_routes),
    ("padded = unpadded", check_padding),
    ("mixed prefixes = one by one", check_mixed),
    ("packed = one pair at a time", check_packing),
    ("generation uses the prefix", check_in_generation),
    ("cached decoding = full recomputation", check_greedy),
    ("sliding windows keep the prefix", check_sliding_window),
    ("dropout stays off in training mode", check_evaluation_mode),
    ("gradient checkpointing changes nothing", check_checkpointing),
)
