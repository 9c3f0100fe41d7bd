"""The self-check: does this backbone, in this installation, really use prefixes, everywhere and exactly?

A prefix that is ignored raises no error: training goes on, text comes out. So every way of using one is run here on the
real model with random prefixes, and compared with the plainest way: one unpadded row, computed in full, no cache.

In float32 the largest difference is compared, relative to the largest number of the reference, and decoded tokens must
be the same. In bfloat16 and float16 the root mean square of the differences is, relative to the reference's, since
single numbers stray far by rounding; decoded tokens are not compared, since near ties may flip, but the scores of the
very tokens that were chosen. The bounds are wider there, so that a fault of a single layer may hide below them: run in
float32 to be sure.

Checks that a model gives no occasion for are left out: sliding windows, where no layer has one, or where it is too long
to be tried (over 512 positions, or over what the model allows); gradient checkpointing, where the model has none.

Knows nothing of files, consoles or training runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prefixtune import attach
from prefixtune.backbone import Backbone
from prefixtune.batching import Encoded, pack
from prefixtune.errors import BackboneError, ConfigError
from prefixtune.generation import GenerateConfig, generate_ids
from prefixtune.loss import token_losses
from prefixtune.prefix import Prefix

__all__ = ["Check", "examine"]

_LONGER = 2
"""Positions that the second prefix has more than the first."""
_NEW_TOKENS = 5
_BEAMS = 3
_STRENGTHS = (1.0, 4.0, 16.0)
"""What the prefixes' values are multiplied by, until every layer's prefix shows in the logits."""
_LONGEST_WINDOW = 512
_TINY = 1e-30
_ROOM = 24
"""Positions that the longest of the short texts here and its continuation may take, and some more."""

_BOUNDS = {torch.bfloat16: (5e-2, 4e-3), torch.float16: (1e-2, 1e-3)}
"""Half-precision dtype -> how far apart equal things may be, and what a prefix must change at least."""
_FLOAT32_BOUNDS = (1e-4, 1e-3)

_BOOKKEEPING = frozenset({"_gradient_checkpointing_func", "gradient_checkpointing", "_require_grads_hooks"})
"""Attributes that transformers' gradient checkpointing leaves behind; without effect once it is off."""


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


@dataclass(frozen=True, eq=False)
class _Subject:
    """The backbone under examination, and what it is examined with.

    Attributes:
        backbone: The backbone.
        tolerance: How far apart equal things may be.
        effect: What a prefix must change at least.
        first: A prefix of P positions.
        second: A longer one.
        layer_effects: What replacing one layer of `first` changes in the logits, for every layer.
        strength: What the values were multiplied by for that.
        vocabulary: Ordinary token ids.
        generator: Draws them.
        before: The model's state at the start.
    """

    backbone: Backbone
    tolerance: float
    effect: float
    first: Prefix
    second: Prefix
    layer_effects: tuple[float, ...]
    strength: float
    vocabulary: Tensor
    generator: torch.Generator
    before: _State

    def distance(self, ones: Sequence[Tensor], references: Sequence[Tensor]) -> float:
        """How far apart things are that should be equal, or that a prefix should change."""
        return _distance(ones, references, self.backbone.dtype)

    @property
    def exact(self) -> bool:
        """Whether decoded tokens must be the same."""
        return self.backbone.dtype not in _BOUNDS

    def texts(self, *lengths: int) -> list[list[int]]:
        """Random texts."""
        return [_draw(self.vocabulary, length, self.generator) for length in lengths]


_Finding = tuple[bool, str] | None
"""Whether a check passed, and its detail; None: there is no occasion for it."""


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
        backbone: Any backbone, in any dtype.
        prefix_length: P, of the shorter of the two random prefixes.
        seed: Of prefixes and texts.
        on_check: Told of every check as soon as it is done.

    Returns:
        All checks, in the order of their doing.

    Raises:
        ConfigError: The prefix length is below 1 or leaves no room for text.
    """
    limit = backbone.max_positions
    if prefix_length < 1 or (limit is not None and prefix_length + _LONGER + _ROOM > limit):
        allowed = "at least 1" if limit is None else f"between 1 and {limit - _LONGER - _ROOM}"
        raise ConfigError(f"prefix_length is {prefix_length}, but must be {allowed}.", hint="5 is a good choice.")
    checks: list[Check] = []

    def note(name: str, run: Callable[[], _Finding]) -> None:
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
        try:
            subject = _prepare(backbone, prefix_length, seed)
        except Exception as error:
            detail = _one_line(error)
            note(_CHECKS[0][0], lambda: (False, detail))
            return checks
        try:
            for name, check in _CHECKS:
                note(name, lambda check=check: check(subject))  # type: ignore[misc]
        finally:
            for module, mode in modes:
                module.training = mode
    return checks


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# --- random prefixes, strong enough to matter ------------------------------------------------------------------------


def _prepare(backbone: Backbone, prefix_length: int, seed: int) -> _Subject:
    """Record two prefixes from random tokens, and strengthen them until every layer's part shows.

    Raises:
        BackboneError: Not every layer that was found at loading attends through the registry now.
    """
    tolerance, effect = _BOUNDS.get(backbone.dtype, _FLOAT32_BOUNDS)
    generator = torch.Generator().manual_seed(seed)
    size = min(int(backbone.model.get_input_embeddings().weight.shape[0]), len(backbone.tokenizer))
    vocabulary = torch.tensor([n for n in range(size) if n not in (backbone.end_id, backbone.pad_id)])
    before = _State.of(backbone.model)

    def recorded(length: int) -> Prefix:
        ids = torch.tensor([_draw(vocabulary, length, generator)], device=backbone.device)
        try:
            prefix = attach.record(backbone.model, backbone.layout, ids)
        except ConfigError as error:
            raise BackboneError(f"no layer attends through transformers' registry: {error.message}") from error
        if prefix.geometry != dict(backbone.geometry):
            raise BackboneError("not every layer attends through transformers' registry, as it did when it was loaded.")
        return prefix.to(device=backbone.device)

    first, second, other = (recorded(length) for length in (prefix_length, prefix_length + _LONGER, prefix_length))
    text = _draw(vocabulary, 8, generator)
    effects: list[float] = []
    strength = _STRENGTHS[0]
    for strength in _STRENGTHS:
        strong, replacement = _strengthen(first, strength), _strengthen(other, strength)
        whole = _injected(backbone, [text], [strong])
        effects = [
            _distance(_injected(backbone, [text], [_replace(strong, replacement, number)]), whole, backbone.dtype)
            for number in range(len(strong.layers["decoder"]))
        ]
        if min(effects) >= effect:
            break
    return _Subject(
        backbone,
        tolerance,
        effect,
        _strengthen(first, strength),
        _strengthen(second, strength),
        tuple(effects),
        strength,
        vocabulary,
        generator,
        before,
    )


def _draw(vocabulary: Tensor, length: int, generator: torch.Generator) -> list[int]:
    ids: list[int] = vocabulary[torch.randint(len(vocabulary), (length,), generator=generator)].tolist()
    return ids


def _strengthen(prefix: Prefix, strength: float) -> Prefix:
    return Prefix({site: tuple((k, v * strength) for k, v in layers) for site, layers in prefix.layers.items()})


def _replace(prefix: Prefix, other: Prefix, number: int) -> Prefix:
    """A prefix with one layer of another."""
    layers = list(prefix.layers["decoder"])
    layers[number] = other.layers["decoder"][number]
    return Prefix({"decoder": tuple(layers)})


# --- running and comparing -------------------------------------------------------------------------------------------


def _distance(ones: Sequence[Tensor], references: Sequence[Tensor], dtype: torch.dtype) -> float:
    """How far apart lists of tensors are, relative to the references; infinite where one is not finite.

    In float32 by the single largest difference of each pair; in half precision by the root mean square over all pairs,
    since there a few numbers stray far by rounding alone.
    """
    pairs = [(one.detach().float(), other.detach().float()) for one, other in zip(ones, references, strict=True)]
    if any(a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()) for a, b in pairs):
        return float("inf")
    if dtype in _BOUNDS:
        difference = sum(float((a - b).square().sum()) for a, b in pairs)
        return math.sqrt(difference / max(sum(float(b.square().sum()) for _, b in pairs), _TINY))
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=_TINY)) for a, b in pairs)


def _same(what: str, distance: float, subject: _Subject) -> tuple[bool, str]:
    return distance <= subject.tolerance, f"{what} differ by {distance:.1e} (at most {subject.tolerance:g})"


def _padded(rows: Sequence[Sequence[int]], side: str, extra: int, device: Any) -> tuple[Tensor, Tensor]:
    """Ids and mask; the padding is of ids that would matter, were they seen."""
    longest = max(map(len, rows)) + extra
    ids, mask = [], []
    for row in rows:
        missing = longest - len(row)
        padding, hidden, real = [row[0]] * missing, [0] * missing, [1] * len(row)
        ids.append([*padding, *row] if side == "left" else [*row, *padding])
        mask.append(hidden + real if side == "left" else real + hidden)
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _injected(
    backbone: Backbone,
    rows: Sequence[Sequence[int]],
    prefixes: Sequence[Prefix | None],
    *,
    side: str = "left",
    extra: int = 0,
) -> list[Tensor]:
    """Each row's logits by the injected route, (T, V) at real positions; a single row comes without a mask."""
    if len(rows) == 1 and not extra:
        ids = torch.tensor([rows[0]], device=backbone.device)
        return [backbone.forward(ids, prefixes=list(prefixes)).logits[0]]
    ids, mask = _padded(rows, side, extra, backbone.device)
    logits = backbone.forward(ids, mask, prefixes=list(prefixes)).logits
    return [row[real.bool()] for row, real in zip(logits, mask, strict=True)]


def _alone(backbone: Backbone, rows: Sequence[Sequence[int]], prefixes: Sequence[Prefix | None]) -> list[Tensor]:
    """`_injected`, one row at a time."""
    return [_injected(backbone, [row], [prefix])[0] for row, prefix in zip(rows, prefixes, strict=True)]


def _prefilled(backbone: Backbone, rows: Sequence[Sequence[int]], prefixes: Sequence[Prefix | None]) -> list[Tensor]:
    """Each row's logits by the prefilled route, left-padded, (T, V) at real positions."""
    cache, slots = attach.prefilled_cache(backbone.model, backbone.layout, prefixes)
    ids, mask = _padded(rows, "left", 0, backbone.device)
    whole = torch.cat([slots.long(), mask], dim=1)
    positions = (whole.cumsum(1) - 1).clamp(min=0)[:, slots.shape[1] :]
    arguments = {attach.cache_argument(backbone.model): cache}
    with attach.visible_slots(slots.shape[1]):
        output = backbone.model(
            input_ids=ids, attention_mask=whole, position_ids=positions, use_cache=True, **arguments
        )
    return [row[real.bool()] for row, real in zip(output.logits, mask, strict=True)]


@dataclass
class _Decoded:
    """What `generate_ids` did.

    Attributes:
        tokens: Per row, what was generated.
        logits: Per step, the model's own at each row's last position, (B, V).
        widths: Per step, how many positions were computed.
    """

    tokens: list[list[int]]
    logits: list[Tensor] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)


def _decode(
    backbone: Backbone, prompts: Sequence[Sequence[int]], prefixes: Sequence[Prefix | None], num_beams: int = 1
) -> _Decoded:
    """Generate in one batch, watching the model; prompts must be sorted by length, as the batch will be."""
    seen = _Decoded([])

    def watch(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        seen.logits.append(output.logits[:, -1].float())
        seen.widths.append(int(kwargs["input_ids"].shape[1]))

    config = GenerateConfig(
        max_new_tokens=_NEW_TOKENS, min_new_tokens=_NEW_TOKENS, num_beams=num_beams, batch_size=len(prompts)
    )
    hook = backbone.model.register_forward_hook(watch, with_kwargs=True)
    try:
        seen.tokens = generate_ids(backbone, prompts, prefixes, config=config)
    finally:
        hook.remove()
    if any(len(tokens) != _NEW_TOKENS for tokens in seen.tokens):
        counts = [len(tokens) for tokens in seen.tokens]
        raise BackboneError(f"asked for {_NEW_TOKENS} tokens, but {counts} were generated.")
    return seen


def _recomputed(backbone: Backbone, prompt: Sequence[int], tokens: Sequence[int], prefix: Prefix | None) -> Tensor:
    """Logits that choose each of `tokens`, computed in full, (N, V)."""
    return _injected(backbone, [[*prompt, *tokens[:-1]]], [prefix])[0][len(prompt) - 1 :].float()


def _without_end(backbone: Backbone, scores: Tensor) -> Tensor:
    """Scores with the end token ruled out, as it is while fewer than `min_new_tokens` are there."""
    scores = scores.clone()
    scores[:, backbone.end_id] = float("-inf")
    return scores


# --- the checks ------------------------------------------------------------------------------------------------------


def _registry(subject: _Subject) -> _Finding:
    count = len(subject.backbone.geometry["decoder"])
    chosen = getattr(subject.backbone.model.config, "_attn_implementation", None)
    return (
        chosen == attach.ATTENTION,
        f"{count} of {count} layers, attention function {chosen!r} (must be {attach.ATTENTION!r})",
    )


def _layers(subject: _Subject) -> _Finding:
    effects = subject.layer_effects
    weakest = min(range(len(effects)), key=effects.__getitem__)
    dead = [number for number, effect in enumerate(effects) if not effect >= subject.effect]
    detail = (
        f"replacing one layer's prefix moves the logits by {effects[weakest]:.1e} or more (layer {weakest}; "
        f"at least {subject.effect:g}; strength {subject.strength:g})"
    )
    return not dead, detail + (f"; too little in layers {', '.join(map(str, dead))}" if dead else "")


def _training_gradients(subject: _Subject) -> tuple[float, list[Tensor]]:
    """Loss of a padded, mixed batch, and its gradient at every key and value of both prefixes."""
    backbone = subject.backbone
    leaves = [prefix.to(backbone.dtype).leaves() for prefix in (subject.first, subject.second)]
    generator = torch.Generator().manual_seed(1)
    rows = [_draw(subject.vocabulary, length, generator) for length in (6, 9)]
    with torch.enable_grad():
        ids, mask = _padded(rows, "left", 0, backbone.device)
        logits = backbone.forward(ids, mask, prefixes=leaves).logits
        chosen = mask[:, :-1].bool()
        loss = token_losses(logits[:, :-1][chosen], ids[:, 1:][chosen]).sum()
        return float(loss.detach()), list(torch.autograd.grad(loss, [t for leaf in leaves for t in leaf.tensors()]))


def _gradients(subject: _Subject) -> _Finding:
    _alone(subject.backbone, subject.texts(4), [subject.first])  # a pass without gradients must leave nothing behind
    _, gradients = _training_gradients(subject)
    finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
    largest = torch.cat([gradient.float().abs().amax(dim=(0, 2)) for gradient in gradients])
    dead = int((largest == 0).sum())
    detail = (
        f"{len(largest) - dead} of {len(largest)} key and value slots of all layers, in a padded batch "
        f"(the weakest gets {float(largest.min()):.1e}; above 0)"
    )
    return finite and not dead, detail + ("" if finite else "; some are not finite")


def _causality(subject: _Subject) -> _Finding:
    (row,) = subject.texts(8)
    spare = next(int(n) for n in subject.vocabulary if int(n) != row[-1])
    one, other = _alone(subject.backbone, [row, [*row[:-1], spare]], [subject.first] * 2)
    return _same("logits before a changed token", subject.distance([other[:-1]], [one[:-1]]), subject)


def _routes(subject: _Subject) -> _Finding:
    rows, prefixes = subject.texts(4, 6, 9), [subject.first, None, subject.second]
    distance = subject.distance(
        _prefilled(subject.backbone, rows, prefixes), _injected(subject.backbone, rows, prefixes)
    )
    return _same("logits of 3 rows", distance, subject)


def _padding(subject: _Subject) -> _Finding:
    rows, prefixes = subject.texts(6), [subject.first]
    reference = _alone(subject.backbone, rows, prefixes)
    left, right = (
        subject.distance(_injected(subject.backbone, rows, prefixes, side=side, extra=3), reference)
        for side in ("left", "right")
    )
    passed, detail = _same("logits", max(left, right), subject)
    return passed, f"{detail}; left {left:.1e}, right {right:.1e}"


def _batched(subject: _Subject, prefixes: Sequence[Prefix | None], what: str) -> _Finding:
    rows = subject.texts(4, 6, 9)
    reference = _alone(subject.backbone, rows, prefixes)
    distance = max(
        subject.distance(_injected(subject.backbone, rows, prefixes, side=side), reference)
        for side in ("left", "right")
    )
    return _same(what, distance, subject)


def _batch(subject: _Subject) -> _Finding:
    return _batched(subject, [subject.first] * 3, "logits of 3 rows with one prefix")


def _mixed(subject: _Subject) -> _Finding:
    lengths = f"{subject.first.prefix_length}, none and {subject.second.prefix_length}"
    return _batched(subject, [subject.first, None, subject.second], f"logits of 3 rows with prefixes of {lengths}")


def _packing(subject: _Subject) -> _Finding:
    backbone = subject.backbone
    source, other, *targets = subject.texts(4, 1, 5, 3, 4)
    examples = [Encoded(tuple(source), tuple(map(tuple, targets[:2]))), Encoded(tuple(other), (tuple(targets[2]),))]
    batch = pack(examples)
    logits = backbone.forward(
        batch.input_ids.to(backbone.device),
        prefixes=subject.first,
        packing=batch.packing,
        logits_to_keep=batch.label_positions.to(backbone.device),
    ).logits[0]
    packed = token_losses(logits, batch.labels.to(backbone.device))
    pairs = [(example.prompt, target) for example in examples for target in example.targets]
    alone = [
        token_losses(_recomputed(backbone, p, t, subject.first), torch.tensor(t, device=backbone.device))
        for p, t in pairs
    ]
    return _same(f"losses of {len(packed)} tokens", subject.distance([packed], [torch.cat(alone)]), subject)


def _compare_decoding(
    subject: _Subject, prompts: Sequence[Sequence[int]], prefixes: Sequence[Prefix | None]
) -> tuple[bool, str]:
    """Greedy generation in one batch against each row's full recomputation.

    Every token is compared with the likeliest one after all before it, so that equal tokens mean equal decoding.
    """
    backbone = subject.backbone
    decoded = _decode(backbone, prompts, prefixes)
    references, flipped = [], 0
    for prompt, tokens, prefix in zip(prompts, decoded.tokens, prefixes, strict=True):
        reference = _recomputed(backbone, prompt, tokens, prefix)
        references.append(reference)
        best = _without_end(backbone, reference).argmax(-1)
        flipped += int((best.cpu() != torch.tensor(tokens)).sum())
    widest = max(decoded.widths[1:])
    passed, detail = _same("logits", subject.distance(list(torch.stack(decoded.logits, dim=1)), references), subject)
    if subject.exact:
        total = sum(map(len, decoded.tokens))
        detail = f"{total - flipped} of {total} tokens are the same; {detail}"
        passed = passed and not flipped
    if widest != 1:
        detail += f"; a step computes {widest} positions instead of 1: the cache is lost"
    return passed and widest == 1, detail


def _greedy(subject: _Subject) -> _Finding:
    return _compare_decoding(subject, subject.texts(3, 5, 6), [subject.first, None, subject.second])


def _search(backbone: Backbone, prompt: Sequence[int], prefix: Prefix | None) -> tuple[list[int], float]:
    """Beam search without a cache: the best beam, and its mean log-probability."""
    beams: list[list[int]] = [[]]
    scores = torch.zeros(1, device=backbone.device)
    for _ in range(_NEW_TOKENS):
        ids = torch.tensor([[*prompt, *beam] for beam in beams], device=backbone.device)
        logits = backbone.forward(ids, prefixes=[prefix] * len(beams)).logits[:, -1].float()
        total = scores[:, None] + _without_end(backbone, logits.log_softmax(-1))
        scores, places = total.flatten().topk(_BEAMS)
        beams = [[*beams[place // total.shape[1]], place % total.shape[1]] for place in places.tolist()]
    return beams[0], float(scores[0]) / _NEW_TOKENS


def _beams(subject: _Subject) -> _Finding:
    backbone = subject.backbone
    # As many rows as beams: cache rows in another order would then meet another text's prefix.
    prompts, prefixes = subject.texts(3, 5, 6), [subject.first, None, subject.second]
    outputs = _decode(backbone, prompts, prefixes, num_beams=_BEAMS).tokens
    different, distance = 0, 0.0
    for prompt, tokens, prefix in zip(prompts, outputs, prefixes, strict=True):
        best, score = _search(backbone, prompt, prefix)
        logits = _recomputed(backbone, prompt, tokens, prefix)
        chosen = logits.log_softmax(-1).gather(1, torch.tensor(tokens, device=logits.device)[:, None])
        different += tokens != best
        distance = max(distance, abs(float(chosen.mean()) - score) / float(logits.abs().max()))
    passed, detail = _same("mean log-probabilities", distance, subject)
    if not subject.exact:
        return passed, f"{_BEAMS} beams, 3 rows: {detail}"
    return passed and not different, f"{_BEAMS} beams: {3 - different} of 3 rows have the same tokens; {detail}"


def _in_generation(subject: _Subject) -> _Finding:
    prompts = subject.texts(4, 4, 4)
    prefixed = _decode(subject.backbone, prompts, [subject.first] * 3)
    bare = _decode(subject.backbone, prompts, [None] * 3)
    effect = min(subject.distance([a], [b]) for a, b in zip(prefixed.logits[0], bare.logits[0], strict=True))
    changed = sum(one != other for one, other in zip(prefixed.tokens, bare.tokens, strict=True))
    detail = (
        f"logits differ from the bare backbone's by {effect:.1e} (at least {subject.effect:g}); "
        f"{changed} of 3 outputs differ"
    )
    return subject.effect <= effect < float("inf"), detail


def _windows(backbone: Backbone) -> tuple[int, list[int]]:
    """The positions that windowed (or chunked) layers see, and their numbers."""
    config = backbone.model.config.get_text_config(decoder=True)
    count = len(backbone.geometry["decoder"])
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * count
    for kind, name in (("sliding_attention", "sliding_window"), ("chunked_attention", "attention_chunk_size")):
        size = getattr(config, name, None)
        numbers = [number for number, layer in enumerate(kinds) if layer == kind]
        if size and numbers:
            return int(size), numbers
    return 0, []


def _sliding_window(subject: _Subject) -> _Finding:
    backbone = subject.backbone
    window, numbers = _windows(backbone)
    limit = backbone.max_positions
    length = window + 3
    needed = subject.second.prefix_length + length + _NEW_TOKENS
    if not numbers or window > _LONGEST_WINDOW or (limit is not None and needed > limit):
        return None
    (row,) = subject.texts(length)
    visible = _visible_slots(subject, row, numbers)
    total = len(numbers) * subject.second.prefix_length
    injected = _injected(backbone, [row], [subject.second])
    routes = subject.distance(_prefilled(backbone, [row], [subject.second]), injected)
    passed, detail = _compare_decoding(subject, [row], [subject.second])
    return (
        passed and visible == total and routes <= subject.tolerance,
        f"window {window}, {len(numbers)} layers: {visible} of {total} slots seen from text position {length}; "
        f"routes differ by {routes:.1e}; decoding: {detail}",
    )


def _visible_slots(subject: _Subject, row: Sequence[int], numbers: Sequence[int]) -> int:
    """How many prefix slots the last token sees directly, over the given layers.

    What one layer's own attention gives at the last position can depend on that layer's prefix values by direct sight
    only; so a slot is seen where that derivative is not zero.
    """
    backbone = subject.backbone
    leaf = subject.second.to(backbone.dtype).leaves()
    outputs: dict[int, Tensor] = {}
    with contextlib.ExitStack() as stack, torch.enable_grad():
        for module, (_, number) in backbone.layout.places.items():

            def keep(_module: nn.Module, _args: Any, output: Any, number: int = number) -> None:
                outputs[number] = (output[0] if isinstance(output, tuple) else output)[0, -1]

            stack.callback(module.register_forward_hook(keep).remove)
        backbone.forward(torch.tensor([row], device=backbone.device), prefixes=leaf)
        seen = 0
        for number in numbers:
            weights = torch.randn(outputs[number].shape, generator=subject.generator).to(outputs[number])
            value = leaf.layers["decoder"][number][1]
            (gradient,) = torch.autograd.grad((outputs[number] * weights).sum(), [value], retain_graph=True)
            seen += int((gradient.abs().amax(dim=(0, 2)) > 0).sum())
    return seen


def _evaluation_mode(subject: _Subject) -> _Finding:
    model = subject.backbone.model
    modes = [(module, module.training) for module in model.modules()]
    training = sum(mode for _, mode in modes)
    rows, prefixes = subject.texts(8), [subject.first]
    reference = _alone(subject.backbone, rows, prefixes)
    try:
        model.train()
        distance = max(subject.distance(_alone(subject.backbone, rows, prefixes), reference) for _ in range(2))
    finally:
        for module, mode in modes:
            module.training = mode
    passed, detail = _same("logits after .train()", distance, subject)
    return passed and not training, detail + (f"; {training} modules are in training mode" if training else "")


def _checkpointing(subject: _Subject) -> _Finding:
    model = subject.backbone.model
    if not getattr(model, "supports_gradient_checkpointing", False):
        return None
    loss, gradients = _training_gradients(subject)
    with attach.checkpointing(model):
        other_loss, others = _training_gradients(subject)
    losses = abs(loss - other_loss) / max(abs(loss), 1e-30)
    return _same("losses and gradients", max(losses, subject.distance(others, gradients)), subject)


@dataclass(frozen=True)
class _State:
    """Everything about a model that must not change.

    Attributes:
        tensors: Name of a parameter or buffer -> a hash of its bits.
        modules: Name of a module -> its class, attributes, number of hooks, and mode.
    """

    tensors: dict[str, str]
    modules: dict[str, tuple[object, ...]]

    @classmethod
    def of(cls, model: Any) -> _State:
        tensors = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            bits = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            tensors[name] = f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(bits).hexdigest()}"
        modules: dict[str, tuple[object, ...]] = {}
        for name, module in model.named_modules():
            attributes = vars(module)
            hooks = sum(len(attributes[name]) for name in attributes if name.endswith("_hooks"))
            names = frozenset(attributes) - _BOOKKEEPING
            modules[name] = (type(module), names, hooks, module.training)
        return cls(tensors, modules)

    def changes(self, other: _State) -> list[str]:
        """What differs, in words."""
        words = [
            name for name in self.tensors.keys() | other.tensors if self.tensors.get(name) != other.tensors.get(name)
        ]
        parts = ("class", "attributes", "hooks", "mode")
        for name in self.modules.keys() | other.modules:
            one, two = self.modules.get(name), other.modules.get(name)
            if one is None or two is None:
                words.append(f"module {name!r}")
            elif one != two:
                changed = [part for part, a, b in zip(parts, one, two, strict=True) if a != b]
                words.append(f"{' and '.join(changed)} of {name or 'the model'}")
        return sorted(words)


def _untouched(subject: _Subject) -> _Finding:
    model = subject.backbone.model
    changes = subject.before.changes(_State.of(model))
    changes += [f"gradient of {n}" for n, p in model.named_parameters() if p.requires_grad or p.grad is not None]
    count = len(subject.before.tensors)
    if changes:
        return False, f"{len(changes)} changed (at most 0): {', '.join(changes[:3])}"
    return True, f"{count} of {count} parameters and buffers are bit for bit the same; no hook or attribute is left"


_CHECKS: tuple[tuple[str, Callable[[_Subject], _Finding]], ...] = (
    ("every layer attends through the registry", _registry),
    ("every layer receives the prefix", _layers),
    ("every prefix slot receives a gradient", _gradients),
    ("no token sees a later one", _causality),
    ("injected = prefilled", _routes),
    ("padded = unpadded", _padding),
    ("batch = single", _batch),
    ("mixed prefixes = one by one", _mixed),
    ("packed = one pair at a time", _packing),
    ("generation uses the prefix", _in_generation),
    ("cached decoding = full recomputation", _greedy),
    ("beam search = full recomputation", _beams),
    ("sliding windows keep the prefix", _sliding_window),
    ("dropout stays off in training mode", _evaluation_mode),
    ("gradient checkpointing changes nothing", _checkpointing),
    ("the backbone is untouched", _untouched),
)
