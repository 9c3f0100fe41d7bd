"""Checks of decoding: does generation with a cache, and behind a sliding window, see the prefix as it should?"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prefixtune.attention.layout import setting
from prefixtune.doctor.cached import decode, prefilled_logits
from prefixtune.doctor.reference import (
    NEW_TOKENS,
    Text,
    compute_outputs,
    mask_scores,
    recompute_logits,
    slot_gradients,
)
from prefixtune.doctor.subject import CheckResult, Subject
from prefixtune.prefix.geometry import Site
from prefixtune.prefix.prefix import Prefix

__all__ = ["check_greedy", "check_in_generation", "check_sliding_window"]


_LONGEST_WINDOW = 512
_STATE_BOUND = 5e-3
"""The tolerance in float32 where layers keep a state: some of transformers' state-space layers limit their time steps
only in a full pass, not in single steps (Zamba2, Nemotron-H)."""


# --- generation ------------------------------------------------------------------------------------------------------


def check_in_generation(subject: Subject) -> CheckResult:
    """In generation, the prefix changes every row's logits."""
    if subject.backbone.kind == "encoder":
        return None
    prompts = subject.ids(4, 4, 4)
    prefixed = decode(subject.backbone, prompts, [subject.first] * 3)
    bare = decode(subject.backbone, prompts, [None] * 3)
    effect = min(subject.difference([a], [b]) for a, b in zip(prefixed.logits[0], bare.logits[0], strict=True))
    num_changed = sum(a != b for a, b in zip(prefixed.tokens, bare.tokens, strict=True))
    detail = (
        f"logits differ from the bare backbone's by {effect:.1e} (at least {subject.min_effect:.1e}); "
        f"{num_changed} of 3 outputs differ"
    )
    return subject.min_effect <= effect < math.inf, detail


def _compare_decoding(
    subject: Subject, prompts: Sequence[Sequence[int]], prefixes: Sequence[Prefix | None]
) -> tuple[bool, str]:
    """Greedy generation in one batch against each row, computed in full.

    Every token is compared with the likeliest one after all tokens before it, so equal tokens mean equal decoding.
    """
    backbone = subject.backbone
    decoded = decode(backbone, prompts, prefixes)
    references, num_flipped = [], 0
    for prompt, tokens, prefix in zip(prompts, decoded.tokens, prefixes, strict=True):
        reference = recompute_logits(backbone, prompt, tokens, prefix)
        references.append(reference)
        best = mask_scores(backbone, reference).argmax(-1)
        num_flipped += int((best.cpu() != torch.tensor(tokens)).sum())
    widest = max(decoded.widths[1:])
    difference = subject.difference(list(torch.stack(decoded.logits, dim=1)), references)
    is_stateful = backbone.kind == "decoder" and not backbone.layout.packable
    passed, detail = subject.check_equal("logits", difference, _STATE_BOUND if is_stateful else 0.0)
    if subject.is_exact:
        total = sum(map(len, decoded.tokens))
        detail = f"{total - num_flipped} of {total} tokens are the same; {detail}"
        passed = passed and not num_flipped
    if widest != 1:
        detail += f"; a step computes {widest} positions instead of 1: the cache is lost"
    return passed and widest == 1, detail


def check_greedy(subject: Subject) -> CheckResult:
    """Greedy decoding gives the same with a cache and without one."""
    if subject.backbone.kind == "encoder":
        return None
    return _compare_decoding(subject, subject.ids(3, 5, 6), [subject.first, None, subject.second])


# --- windows ---------------------------------------------------------------------------------------------------------


def _longest_window(model: Any) -> int:
    """The longest window (or chunk) of the model's layers that is short enough to be tried; 0: there is none."""
    lengths = [0]
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    for config in configs.values():
        layer_types = getattr(config, "layer_types", None) or ("sliding_attention",)
        for layer_type, key in (("sliding_attention", "sliding_window"), ("chunked_attention", "attention_chunk_size")):
            if layer_type in layer_types:
                value = setting(config, key)
                lengths.extend(int(length or 0) for length in (value if isinstance(value, list) else [value]))
    return max(length for length in lengths if length <= _LONGEST_WINDOW)


def check_sliding_window(subject: Subject) -> CheckResult:
    """The prefix stays visible beyond a sliding window."""
    backbone, prefix = subject.backbone, subject.second
    window, limit = _longest_window(backbone.model), backbone.max_positions
    length = window + 3
    needed = backbone.prefix_positions(prefix.prefix_length) + length + NEW_TOKENS
    if window < 1 or (limit is not None and needed > limit):
        return None
    texts = subject.texts(length)
    num_seen, num_slots = _count_visible_slots(subject, texts[0])
    detail = f"window {window}: {num_seen} of {num_slots} slots seen from text position {length}"
    passed = num_seen == num_slots
    if backbone.layout.cache_layers is not None:
        injected = compute_outputs(backbone, texts, [prefix])
        difference = subject.difference(prefilled_logits(backbone, texts, [prefix]), injected)
        passed, detail = passed and difference <= subject.tolerance, f"{detail}; routes differ by {difference:.1e}"
    if backbone.kind != "encoder":
        decoding_passed, decoding_detail = _compare_decoding(subject, [texts[0].ids], [prefix])
        passed, detail = passed and decoding_passed, f"{detail}; decoding: {decoding_detail}"
    return passed, detail


def _count_visible_slots(subject: Subject, text: Text) -> tuple[int, int]:
    """How many prefix slots the last token sees, over all attention layers, and how many there are.

    A slot is seen if the derivative of the layer's output by the slot's value is not zero. Every layer's input is
    detached from the graph, so that a slot of one layer does not show in another.
    """
    backbone = subject.backbone
    leaf = subject.second.to(backbone.dtype).leaves()
    layer_outputs: list[tuple[tuple[Site, int], Tensor]] = []

    def detach_inputs(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return tuple(map(_detach, args)), {name: _detach(value) for name, value in kwargs.items()}

    def record(module: nn.Module, args: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        layer_outputs.append((backbone.layout.layer_of[module], tensor[0, -1]))

    with contextlib.ExitStack() as stack, torch.enable_grad():
        for module in backbone.layout.layer_of:
            stack.callback(module.register_forward_pre_hook(detach_inputs, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(record).remove)
        compute_outputs(backbone, [text], [leaf])
        num_seen = num_slots = 0
        for (site, index), output in layer_outputs:
            weights = torch.randn(output.shape, generator=subject.generator).to(output)
            value = leaf.layers[site][index][1]
            (gradient,) = torch.autograd.grad((output * weights).sum(), [value], retain_graph=True)
            slots = slot_gradients([gradient])
            num_seen, num_slots = num_seen + int((slots > 0).sum()), num_slots + len(slots)
    return num_seen, num_slots


def _detach(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
