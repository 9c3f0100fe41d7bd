"""What should hold of a backbone with prefixes, one function per check: the list that the doctor goes through.

Each runs prefixes in one way and compares with the plainest (see `trial`). It returns whether its sentence holds, with
the figures; or None, where the model gives no occasion for it.

Knows nothing of how the subject was prepared and of who is told.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prefixtune import attach, selfcheck, trial
from prefixtune.backbone import Backbone
from prefixtune.batching import Batch, Encoded, collate, pack, pack_pairs, pad
from prefixtune.loss import batch_loss, token_losses
from prefixtune.prefix import Prefix
from prefixtune.trial import Text

__all__ = ["CHECKS", "LONGER", "Finding", "Subject", "draw"]

LONGER = 2
"""Positions that the second prefix has more than the first."""
_BEAMS = 3
_INFINITE = float("inf")
_LONGEST_WINDOW = 512
_STATE_BOUND = 5e-3
"""How far apart steps and full passes may be in float32 where layers keep a state: some of transformers' state-space
layers limit their time steps in a full pass only (Zamba2, Nemotron-H)."""


@dataclass(frozen=True, eq=False)
class Subject:
    """The backbone under examination, and what it is examined with.

    Attributes:
        backbone: The backbone.
        tolerance: How far apart equal things may be.
        effect: What a prefix must change in the outputs at least.
        first: A prefix of P positions at every site.
        second: A longer one.
        layer_effects: Site and number of a layer -> what replacing that layer of `first` changes in its output.
        layer_bounds: The same -> what it must change at least.
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
    layer_effects: dict[tuple[str, int], float]
    layer_bounds: dict[tuple[str, int], float]
    strength: float
    vocabulary: Tensor
    generator: torch.Generator
    before: trial.State

    @property
    def exact(self) -> bool:
        """Whether decoded tokens must be the same."""
        return self.backbone.dtype not in (torch.bfloat16, torch.float16)

    @property
    def sites(self) -> tuple[str, ...]:
        """Where prefixes stand."""
        return self.first.sites

    @property
    def outputs(self) -> str:
        """What the model gives, in words."""
        return "hidden states" if self.backbone.kind == "encoder" else "logits"

    def distance(self, ones: Sequence[Tensor], references: Sequence[Tensor]) -> float:
        """How far apart things are that should be equal, or that a prefix should change."""
        return trial.distance(ones, references, self.backbone.dtype)

    def same(self, what: str, distance: float, tolerance: float = 0.0) -> tuple[bool, str]:
        """Whether things are equal, at most as far apart as is tolerated."""
        bound = max(tolerance, self.tolerance)
        return distance <= bound, f"{what} differ by {distance:.1e} (at most {bound:g})"

    def ids(self, *lengths: int) -> list[list[int]]:
        """Random token ids."""
        return [draw(self.vocabulary, length, self.generator) for length in lengths]

    def texts(self, *lengths: int) -> list[Text]:
        """Random texts; an encoder-decoder's targets have the same lengths in reverse."""
        rows = self.ids(*lengths)
        if self.backbone.kind != "encoder-decoder":
            return [Text(row) for row in rows]
        return [Text(row, target) for row, target in zip(rows, self.ids(*lengths[::-1]), strict=True)]


Finding = tuple[bool, str] | None
"""Whether a check passed, and its detail; None: there is no occasion for it."""


def draw(vocabulary: Tensor, length: int, generator: torch.Generator) -> list[int]:
    """Random token ids."""
    ids: list[int] = vocabulary[torch.randint(len(vocabulary), (length,), generator=generator)].tolist()
    return ids


# --- where prefixes reach --------------------------------------------------------------------------------------------


def _registry(subject: Subject) -> Finding:
    # Its preparation would have failed otherwise.
    geometry = subject.backbone.geometry
    counts = [f"{len(shapes)} of {len(shapes)} {site} layers" for site, shapes in geometry.items()]
    return True, ", ".join(counts)


def _quickly(subject: Subject) -> Finding:
    found = selfcheck.compare(subject.backbone.model, subject.backbone.layout)
    detail = f"{subject.outputs} differ by {found.difference:.1e} (at most {found.bound:g}); effect {found.effect:.1e}"
    return found.passed, detail + ("" if found.differentiable else "; no gradient reaches it in some layer")


def _own_attention(subject: Subject) -> Finding:
    backbone = subject.backbone
    if not subject.exact:
        # The two round scores differently, which half precision shows.
        return None
    rows, prefixes = subject.texts(6, 9), [None, None]
    ours = trial.outputs(backbone, rows, prefixes)
    # Of every part: transformers may refuse to set a part back that it has set.
    configs = {id(m.config): m.config for m in backbone.model.modules() if hasattr(m, "config")}.values()
    chosen = [(config, config._attn_implementation) for config in configs]
    try:
        backbone.model.set_attn_implementation("eager")
        theirs = trial.outputs(backbone, rows, prefixes)
    finally:
        for config, name in chosen:
            config._attn_implementation = name
    return subject.same(f"{subject.outputs} of 2 rows", subject.distance(ours, theirs))


def _layers(subject: Subject) -> Finding:
    dead, weakest = _too_weak(subject, subject.layer_effects)
    detail = (
        f"replacing one layer's prefix moves what that layer gives by {subject.layer_effects[weakest]:.1e} or more "
        f"(layer {_layer_name(subject, weakest)}; at least {subject.layer_bounds[weakest]:.1e}, by the float noise; "
        f"strength {subject.strength:g})"
    )
    words = ", ".join(_layer_name(subject, place) for place in dead)
    return not dead, detail + (f"; too little in layers {words}" if dead else "")


def _too_weak(subject: Subject, effects: dict[tuple[str, int], float]) -> tuple[list[tuple[str, int]], tuple[str, int]]:
    """The layers whose change does not exceed the float noise, and the one that is nearest to it."""
    bounds = subject.layer_bounds
    dead = [place for place, effect in effects.items() if not bounds[place] <= effect < _INFINITE]
    return dead, min(effects, key=lambda place: effects[place] / bounds[place])


def _layer_name(subject: Subject, place: tuple[str, int]) -> str:
    return str(place[1]) if len(subject.sites) == 1 else f"{place[0]} {place[1]}"


def _slots(gradients: Sequence[Tensor]) -> Tensor:
    """The largest gradient of every key and value slot of all layers."""
    return torch.cat([gradient.float().abs().amax(dim=(0, 2)) for gradient in gradients])


def _gradients(subject: Subject) -> Finding:
    backbone = subject.backbone
    # A pass without gradients must leave nothing behind.
    trial.alone(backbone, subject.texts(4), [subject.first])
    _, gradients = trial.gradients(backbone, subject.texts(6, 9), [subject.first, subject.second])
    finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
    largest = _slots(gradients)
    dead = int((largest == 0).sum())
    detail = (
        f"{len(largest) - dead} of {len(largest)} key and value slots of all layers, in a padded batch "
        f"(the weakest gets {float(largest.min()):.1e}; above 0)"
    )
    return finite and not dead, detail + ("" if finite else "; some are not finite")


def _single_sites(subject: Subject) -> Finding:
    if len(subject.sites) == 1:
        return None
    backbone = subject.backbone
    rows = subject.texts(6)
    bare = trial.attended(backbone, rows, [None])
    words, passed = [], True
    for site in subject.sites:
        prefix = trial.only(subject.first, site)
        _, gradients = trial.gradients(backbone, rows, [prefix])
        found = trial.attended(backbone, rows, [prefix])
        effects = {place: subject.distance([found[place]], [bare[place]]) for place in bare if place[0] == site}
        dead, weakest = _too_weak(subject, effects)
        slots = _slots(gradients)
        live = int((slots > 0).sum())
        passed = passed and not dead and live == len(slots)
        bound = subject.layer_bounds[weakest]
        words.append(f"{site} {effects[weakest]:.1e}, {live} of {len(slots)} slots (at least {bound:.1e}, all)")
    return passed, f"alone it moves what its layers give by: {'; '.join(words)}"


def _order(subject: Subject) -> Finding:
    backbone, prefix = subject.backbone, subject.first
    turned = Prefix({site: tuple((k.flip(1), v.flip(1)) for k, v in layers) for site, layers in prefix.layers.items()})
    one, other = trial.alone(backbone, subject.texts(6) * 2, [prefix, turned])
    return subject.same(f"{subject.outputs} with the prefix back to front", subject.distance([other], [one]))


def _causality(subject: Subject) -> Finding:
    backbone = subject.backbone
    if backbone.kind == "encoder":
        return None
    (text,) = subject.texts(8)
    row = text.target or text.ids
    spare = next(int(n) for n in subject.vocabulary if int(n) != row[-1])
    changed = [*row[:-1], spare]
    other = Text(text.ids, changed) if text.target else Text(changed)
    before, after = trial.alone(backbone, [text, other], [subject.first] * 2)
    return subject.same("logits before a changed token", subject.distance([after[:-1]], [before[:-1]]))


# --- rows and batches ------------------------------------------------------------------------------------------------


def _sides(subject: Subject) -> tuple[str, ...]:
    """Where rows are padded. An encoder's positions are counted from the row's beginning, padding or not."""
    return ("left", "right") if subject.backbone.kind == "decoder" else ("right",)


def _routes(subject: Subject) -> Finding:
    if subject.backbone.layout.cache_layers is None:
        return None
    rows, prefixes = subject.texts(4, 6, 9), [subject.first, None, subject.second]
    distance = subject.distance(
        trial.prefilled(subject.backbone, rows, prefixes),
        trial.outputs(subject.backbone, rows, prefixes, side="left"),
    )
    return subject.same("logits of 3 rows", distance)


def _padding(subject: Subject) -> Finding:
    rows, prefixes = subject.texts(6), [subject.first]
    reference = trial.alone(subject.backbone, rows, prefixes)
    distances = {
        side: subject.distance(trial.outputs(subject.backbone, rows, prefixes, side=side, extra=3), reference)
        for side in _sides(subject)
    }
    passed, detail = subject.same(subject.outputs, max(distances.values()))
    return passed, f"{detail}; {', '.join(f'{side} {distance:.1e}' for side, distance in distances.items())}"


def _batched(subject: Subject, prefixes: Sequence[Prefix | None], what: str) -> Finding:
    rows = subject.texts(*(4, 6, 9, 5, 3, 8, 7)[: len(prefixes)])
    reference = trial.alone(subject.backbone, rows, prefixes)
    distance = max(
        subject.distance(trial.outputs(subject.backbone, rows, prefixes, side=side), reference)
        for side in _sides(subject)
    )
    return subject.same(f"{subject.outputs} of {len(rows)} rows with {what}", distance)


def _batch(subject: Subject) -> Finding:
    return _batched(subject, [subject.first] * 3, "one prefix")


def _mixed(subject: Subject) -> Finding:
    first, second, sites = subject.first, subject.second, subject.sites
    prefixes = [first, None, second]
    what = f"prefixes of {first.prefix_length}, none and {second.prefix_length}"
    if len(sites) > 1:
        prefixes += [trial.only(first, site) for site in sites]
        prefixes.append(Prefix({**first.layers, sites[0]: second.layers[sites[0]]}))
        what += ", of one site, and of unequal sites"
    return _batched(subject, prefixes, what)


def _examples(subject: Subject) -> list[Encoded]:
    """A source with two targets, and one with a single target."""
    source, other, *targets = (tuple(ids) for ids in subject.ids(4, 1, 5, 3, 4))
    return [Encoded(source, tuple(targets[:2])), Encoded(other, (targets[2],))]


def _compare_losses(subject: Subject, examples: Sequence[Encoded], batch: Batch) -> Finding:
    """A batch as training makes it against every pair alone: losses, and in float32 the prefix's gradient."""
    backbone = subject.backbone
    leaf = subject.first.to(backbone.dtype).leaves()
    with torch.enable_grad():
        losses = batch_loss(backbone, leaf, batch)
        reference = torch.cat(
            [
                token_losses(
                    trial.recomputed(backbone, example.prompt, target, leaf),
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


def _packing(subject: Subject) -> Finding:
    backbone = subject.backbone
    if not backbone.layout.packable or backbone.kind == "encoder":
        return None
    examples = _examples(subject)
    paired = backbone.kind == "encoder-decoder"
    batch = pack_pairs(examples, start_id=backbone.start_id) if paired else pack(examples)
    return _compare_losses(subject, examples, batch)


def _padded_pairs(subject: Subject) -> Finding:
    backbone = subject.backbone
    if backbone.kind == "encoder":
        return None
    examples = _examples(subject)
    start = backbone.start_id if backbone.kind == "encoder-decoder" else None
    return _compare_losses(subject, examples, pad(examples, pad_id=backbone.pad_id, start_id=start))


def _labelled(subject: Subject) -> Finding:
    """The hidden states that a head reads, in a batch as training makes it, against each text's alone."""
    backbone = subject.backbone
    if backbone.kind == "encoder-decoder":
        return None
    rows = subject.ids(4, 6, 9)
    batch = collate(backbone, [Encoded(tuple(row), ((0,) * len(row),), tuple(range(len(row)))) for row in rows])
    hidden = backbone.hidden_states(**batch.inputs(backbone.device), prefixes=subject.first)
    found = hidden.flatten(0, 1)[batch.label_positions.to(backbone.device)]
    reference = [
        backbone.hidden_states(torch.tensor([row], device=backbone.device), prefixes=subject.first)[0] for row in rows
    ]
    return subject.same(f"hidden states of {len(rows)} texts", subject.distance([found], [torch.cat(reference)]))


# --- generation ------------------------------------------------------------------------------------------------------


def _in_generation(subject: Subject) -> Finding:
    if subject.backbone.kind == "encoder":
        return None
    prompts = subject.ids(4, 4, 4)
    prefixed = trial.decode(subject.backbone, prompts, [subject.first] * 3)
    bare = trial.decode(subject.backbone, prompts, [None] * 3)
    effect = min(subject.distance([a], [b]) for a, b in zip(prefixed.logits[0], bare.logits[0], strict=True))
    changed = sum(one != other for one, other in zip(prefixed.tokens, bare.tokens, strict=True))
    detail = (
        f"logits differ from the bare backbone's by {effect:.1e} (at least {subject.effect:.1e}); "
        f"{changed} of 3 outputs differ"
    )
    return subject.effect <= effect < _INFINITE, detail


def _compare_decoding(
    subject: Subject, prompts: Sequence[Sequence[int]], prefixes: Sequence[Prefix | None]
) -> tuple[bool, str]:
    """Greedy generation in one batch against each row's full recomputation.

    Every token is compared with the likeliest one after all before it, so that equal tokens mean equal decoding.
    """
    backbone = subject.backbone
    decoded = trial.decode(backbone, prompts, prefixes)
    references, flipped = [], 0
    for prompt, tokens, prefix in zip(prompts, decoded.tokens, prefixes, strict=True):
        reference = trial.recomputed(backbone, prompt, tokens, prefix)
        references.append(reference)
        best = trial.allowed(backbone, reference).argmax(-1)
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


def _greedy(subject: Subject) -> Finding:
    if subject.backbone.kind == "encoder":
        return None
    return _compare_decoding(subject, subject.ids(3, 5, 6), [subject.first, None, subject.second])


def _beams(subject: Subject) -> Finding:
    backbone = subject.backbone
    if backbone.kind == "encoder":
        return None
    # As many rows as beams: cache rows in another order would then meet another text's prefix.
    prompts, prefixes = subject.ids(3, 5, 6), [subject.first, None, subject.second]
    found = trial.decode(backbone, prompts, prefixes, num_beams=_BEAMS).tokens
    different, distance = 0, 0.0
    for prompt, tokens, prefix in zip(prompts, found, prefixes, strict=True):
        best, score = trial.search(backbone, prompt, prefix, _BEAMS)
        logits = trial.recomputed(backbone, prompt, tokens, prefix)
        scores = trial.allowed(backbone, logits.log_softmax(-1))
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
                size = attach.setting(config, name)
                sizes.extend(int(one or 0) for one in (size if isinstance(size, list) else [size]))
    return max(size for size in sizes if size <= _LONGEST_WINDOW)


def _sliding_window(subject: Subject) -> Finding:
    backbone, prefix = subject.backbone, subject.second
    window, limit = _window(backbone.model), backbone.max_positions
    length = window + 3
    needed = backbone.taken_positions(prefix.prefix_length) + length + trial.NEW_TOKENS
    if window < 1 or (limit is not None and needed > limit):
        return None
    texts = subject.texts(length)
    seen, total = _visible_slots(subject, texts[0])
    passed, detail = seen == total, f"window {window}: {seen} of {total} slots seen from text position {length}"
    if backbone.layout.cache_layers is not None:
        injected = trial.outputs(backbone, texts, [prefix])
        routes = subject.distance(trial.prefilled(backbone, texts, [prefix]), injected)
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
    found: list[tuple[tuple[str, int], Tensor]] = []

    def cut(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return tuple(map(_detached, args)), {name: _detached(given) for name, given in kwargs.items()}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.append((backbone.layout.places[module], (output[0] if isinstance(output, tuple) else output)[0, -1]))

    with contextlib.ExitStack() as stack, torch.enable_grad():
        for module in backbone.layout.places:
            stack.callback(module.register_forward_pre_hook(cut, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(keep).remove)
        trial.outputs(backbone, [text], [leaf])
        seen = total = 0
        for (site, number), output in found:
            weights = torch.randn(output.shape, generator=subject.generator).to(output)
            value = leaf.layers[site][number][1]
            (gradient,) = torch.autograd.grad((output * weights).sum(), [value], retain_graph=True)
            slots = _slots([gradient])
            seen, total = seen + int((slots > 0).sum()), total + len(slots)
    return seen, total


def _detached(given: Any) -> Any:
    return given.detach() if isinstance(given, Tensor) else given


# --- modes, and what stays -------------------------------------------------------------------------------------------


def _evaluation_mode(subject: Subject) -> Finding:
    backbone = subject.backbone
    modes = [(module, module.training) for module in backbone.model.modules()]
    training = sum(mode for _, mode in modes)
    rows, prefixes = subject.texts(8), [subject.first]
    reference = trial.alone(backbone, rows, prefixes)
    try:
        backbone.model.train()
        distance = max(subject.distance(trial.alone(backbone, rows, prefixes), reference) for _ in range(2))
    finally:
        for module, mode in modes:
            module.training = mode
    passed, detail = subject.same(f"{subject.outputs} after .train()", distance)
    return passed and not training, detail + (f"; {training} modules are in training mode" if training else "")


def _checkpointing(subject: Subject) -> Finding:
    backbone = subject.backbone
    if not backbone.layout.carries or not getattr(backbone.model, "supports_gradient_checkpointing", False):
        return None
    rows, prefixes = subject.texts(6, 9), [subject.first, subject.second]
    reference, gradients = trial.gradients(backbone, rows, prefixes)
    with attach.checkpointing(backbone.model):
        others, other_gradients = trial.gradients(backbone, rows, prefixes)
    distance = max(subject.distance(others, reference), subject.distance(other_gradients, gradients))
    return subject.same(f"{subject.outputs} and gradients", distance)


def _untouched(subject: Subject) -> Finding:
    changes = subject.before.changes(trial.State.of(subject.backbone.model))
    count = len(subject.before.tensors)
    if changes:
        return False, f"{len(changes)} changed (at most 0): {', '.join(changes[:3])}"
    return True, f"{count} of {count} parameters and buffers are bit for bit the same; no hook or attribute is left"


CHECKS: tuple[tuple[str, Callable[[Subject], Finding]], ...] = (
    ("every layer attends through the registry", _registry),
    ("the self-check of loading passes", _quickly),
    ("no prefix = transformers' own attention", _own_attention),
    ("every layer receives the prefix", _layers),
    ("every prefix slot receives a gradient", _gradients),
    ("each site works alone", _single_sites),
    ("the order of prefix positions is free", _order),
    ("no token sees a later one", _causality),
    ("injected = prefilled", _routes),
    ("padded = unpadded", _padding),
    ("batch = single", _batch),
    ("mixed prefixes = one by one", _mixed),
    ("packed = one pair at a time", _packing),
    ("padded pairs = one pair at a time", _padded_pairs),
    ("labelled texts = one at a time", _labelled),
    ("generation uses the prefix", _in_generation),
    ("cached decoding = full recomputation", _greedy),
    ("beam search = full recomputation", _beams),
    ("sliding windows keep the prefix", _sliding_window),
    ("dropout stays off in training mode", _evaluation_mode),
    ("gradient checkpointing changes nothing", _checkpointing),
    ("the backbone is untouched", _untouched),
)
