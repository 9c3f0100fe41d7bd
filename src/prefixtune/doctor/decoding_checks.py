"""Decoding checks."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prefixtune.attention.layout import setting
from prefixtune.doctor.attention_checks import INFINITE, slot_gradients
from prefixtune.doctor.reference import NEW_TOKENS, Text, allowed, decode, outputs, prefilled, recomputed, search
from prefixtune.doctor.subject import Finding, Subject
from prefixtune.prefix.geometry import Site
from prefixtune.prefix.prefix import Prefix

_BEAMS = 3
_LONGEST_WINDOW = 512
_STATE_BOUND = 5e-3
"""How far apart steps and full passes may be in float32 where layers keep a state: some of transformers' state-space
layers limit their time steps in a full pass only (Zamba2, Nemotron-H)."""


# --- generation ------------------------------------------------------------------------------------------------------


def check_in_generation(subject: Subject) -> Finding:
    """In generation, each text sees its prefix as in a plain forward pass."""
    if subject.backbone.kind == "encoder":
        return None
    prompts = subject.ids(4, 4, 4)
    prefixed = decode(subject.backbone, prompts, [subject.first] * 3)
    bare = decode(subject.backbone, prompts, [None] * 3)
    effect = min(subject.distance([a], [b]) for a, b in zip(prefixed.logits[0], bare.logits[0], strict=True))
    changed = sum(one != other for one, other in zip(prefixed.tokens, bare.tokens, strict=True))
    detail = (
        f"logits differ from the bare backbone's by {effect:.1e} (at least {subject.effect:.1e}); "
        f"{changed} of 3 outputs differ"
    )
    return subject.effect <= effect < INFINITE, detail


def _compare_decoding(
    subject: Subject, prompts: Sequence[Sequence[int]], prefixes: Sequence[Prefix | None]
) -> tuple[bool, str]:
    """Greedy generation in one batch against each row's full recomputation.

    Every token is compared with the likeliest one after all before it, so that equal tokens mean equal decoding.
    """
    backbone = subject.backbone
    decoded = decode(backbone, prompts, prefixes)
    references, flipped = [], 0
    for prompt, tokens, prefix in zip(prompts, decoded.tokens, prefixes, strict=True):
        reference = recomputed(backbone, prompt, tokens, prefix)
        references.append(reference)
        best = allowed(backbone, reference).argmax(-1)
        flipped += int((best.cpu() != torch.tensor(tokens)).sum())
    widest = max(decoded.widths[1:])
    distance = subject.distance(list(torch.stack(decoded.logits, dim=1)), references)
    stateful = backbone.kind == "decoder" and not backbone.layout.packable
    passed, detail = subject.same("logits", distance, _STATE_BOUND if stateful else 0.0)
    if subject.exact:
        total = sum(map(len, decoded.tokens))
        detail = f"{total - flipped} of {total} tokens are the same; {detail}"
        passed = passed and not flipped
    if widest != 1:
        detail += f"; a step computes {widest} positions instead of 1: the cache is lost"
    return passed and widest == 1, detail


def check_greedy(subject: Subject) -> Finding:
    """Greedy decoding with a cache gives what decoding without one gives."""
    if subject.backbone.kind == "encoder":
        return None
    return _compare_decoding(subject, subject.ids(3, 5, 6), [subject.first, None, subject.second])


def check_beams(subject: Subject) -> Finding:
    """Beam search with a cache gives what one without a cache gives."""
    backbone = subject.backbone
    if backbone.kind == "encoder":
        return None
    # As many rows as beams: cache rows in another order would then meet another text's prefix.
    prompts, prefixes = subject.ids(3, 5, 6), [subject.first, None, subject.second]
    found = decode(backbone, prompts, prefixes, num_beams=_BEAMS).tokens
    different, distance = 0, 0.0
    for prompt, tokens, prefix in zip(prompts, found, prefixes, strict=True):
        best, score = search(backbone, prompt, prefix, _BEAMS)
        logits = recomputed(backbone, prompt, tokens, prefix)
        scores = allowed(backbone, logits.log_softmax(-1))
        chosen = scores.gather(1, torch.tensor(tokens, device=logits.device)[:, None])
        different += tokens != best
        distance = max(distance, abs(float(chosen.mean()) - score) / float(logits.abs().max()))
    passed, detail = subject.same("mean log-probabilities", distance)
    if not subject.exact:
        return passed, f"{_BEAMS} beams, 3 rows: {detail}"
    return passed and not different, f"{_BEAMS} beams: {3 - different} of 3 rows have the same tokens; {detail}"


# --- windows ---------------------------------------------------------------------------------------------------------


def _window(model: Any) -> int:
    """The longest window (or chunk) of a model's layers that can be tried; 0 where there is none."""
    sizes = [0]
    for config in {
        id(module.config): module.config for module in model.modules() if hasattr(module, "config")
    }.values():
        kinds = getattr(config, "layer_types", None) or ("sliding_attention",)
        for kind, name in (("sliding_attention", "sliding_window"), ("chunked_attention", "attention_chunk_size")):
            if kind in kinds:
                size = setting(config, name)
                sizes.extend(int(one or 0) for one in (size if isinstance(size, list) else [size]))
    return max(size for size in sizes if size <= _LONGEST_WINDOW)


def check_sliding_window(subject: Subject) -> Finding:
    """The prefix stays visible beyond a sliding window."""
    backbone, prefix = subject.backbone, subject.second
    window, limit = _window(backbone.model), backbone.max_positions
    length = window + 3
    needed = backbone.prefix_positions(prefix.prefix_length) + length + NEW_TOKENS
    if window < 1 or (limit is not None and needed > limit):
        return None
    texts = subject.texts(length)
    seen, total = _visible_slots(subject, texts[0])
    passed, detail = seen == total, f"window {window}: {seen} of {total} slots seen from text position {length}"
    if backbone.layout.cache_layers is not None:
        injected = outputs(backbone, texts, [prefix])
        routes = subject.distance(prefilled(backbone, texts, [prefix]), injected)
        passed, detail = passed and routes <= subject.tolerance, f"{detail}; routes differ by {routes:.1e}"
    if backbone.kind != "encoder":
        decoded, words = _compare_decoding(subject, [texts[0].ids], [prefix])
        passed, detail = passed and decoded, f"{detail}; decoding: {words}"
    return passed, detail


def _visible_slots(subject: Subject, text: Text) -> tuple[int, int]:
    """How many prefix slots the last token sees, over all attention layers, and how many there are.

    A slot is seen where the derivative of a layer's output by its value is not zero. What enters a layer is cut from
    the graph, so that nothing reaches it by way of others.
    """
    backbone = subject.backbone
    leaf = subject.second.to(backbone.dtype).leaves()
    found: list[tuple[tuple[Site, int], Tensor]] = []

    def cut(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return tuple(map(_detached, args)), {name: _detached(given) for name, given in kwargs.items()}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.append((backbone.layout.layer_of[module], (output[0] if isinstance(output, tuple) else output)[0, -1]))

    with contextlib.ExitStack() as stack, torch.enable_grad():
        for module in backbone.layout.layer_of:
            stack.callback(module.register_forward_pre_hook(cut, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(keep).remove)
        outputs(backbone, [text], [leaf])
        seen = total = 0
        for (site, number), output in found:
            weights = torch.randn(output.shape, generator=subject.generator).to(output)
            value = leaf.layers[site][number][1]
            (gradient,) = torch.autograd.grad((output * weights).sum(), [value], retain_graph=True)
            slots = slot_gradients([gradient])
            seen, total = seen + int((slots > 0).sum()), total + len(slots)
    return seen, total


def _detached(given: Any) -> Any:
    return given.detach() if isinstance(given, Tensor) else given
