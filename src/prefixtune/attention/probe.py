"""Find out, by running a few tokens through a model, which layers can have a prefix, and of what shape.

The geometry, the sites, causality and shared keys are seen in the calls of the attention function, not read from names
in a configuration. A model that cannot have a prefix is refused here, with the reason.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prefixtune.attention.injection import AttentionCall, trace_calls
from prefixtune.attention.kernels import AttentionKernel
from prefixtune.attention.layout import Layout, cache_argument, growing_cache, main_device
from prefixtune.attention.masks import positions_from_mask
from prefixtune.attention.registry import ATTENTIONS, register
from prefixtune.errors import BackboneError, ConfigError, PrefixError, did_you_mean, first_line
from prefixtune.prefix.geometry import LayerShape, Site

_HINT = "use a model whose attention goes through transformers' AttentionInterface, such as LLaMA, Qwen, BART or BERT."
_DECODER_TOKENS, _ENCODER_TOKENS = 5, 4
_SUPPORTED_ARGUMENTS = frozenset(
    {"position_bias", "softcap", "s_aux", "scaling", "dropout", "sliding_window", "is_causal", "position_ids"}
    | {"use_cache", "output_attentions", "output_hidden_states", "return_dict", "deterministic", "layer_idx"}
)
"""Arguments of the attention function that are computed, or that change nothing about it."""
_STATEFUL = ("mamba", "linear", "conv", "recurrent", "ssm", "rwkv", "moe", "mlp")
"""In the types of a hybrid's layers that keep a state instead of keys and values."""
_CACHE_ERRORS = (AttributeError, TypeError, ValueError, RuntimeError, IndexError, KeyError)
"""What a model raises that keeps more than keys and values, in a cache of its own."""


def probe(model: Any, attention: str = "sdpa") -> Layout:
    """Choose this project's attention function for a model and find the layers that can have a prefix.

    Args:
        model: Of transformers.
        attention: What computes the attention: `sdpa`, `eager` or `flex`.

    Raises:
        ConfigError: There is no such attention.
        BackboneError: The model attends through code of its own, takes no positions, does more in its attention than is
            computed here, or fails or computes NaN on a few tokens.
    """
    register()
    kernel = next((kernel for kernel in ATTENTIONS if kernel == attention), None)
    if kernel is None:
        raise ConfigError(f"unknown attention {attention!r}.", hint=did_you_mean(attention, ATTENTIONS))
    name = f"{type(model).__name__} (model type {getattr(model.config, 'model_type', '?')!r})"
    try:
        with torch.no_grad():
            run = _run(model, name, kernel)
            return _encoder_decoder(model, name, run) if model.config.is_encoder_decoder else _stack(model, name, run)
    except PrefixError:
        raise
    except Exception as error:
        raise BackboneError(f"{name} fails on a few tokens: {first_line(error)}", hint=_HINT) from error


class _Run(NamedTuple):
    """What was seen in one small pass.

    Attributes:
        calls: Every call of the attention function.
        logits: The model's outputs: of a row, of the same with another last token, and of one that is padded.
        cache: What kept the keys and values; None: the model cannot have it filled beforehand.
    """

    calls: list[AttentionCall]
    logits: Tensor
    cache: Any


def _run(model: Any, name: str, attention: AttentionKernel) -> _Run:
    """Run a few tokens with the model's own attention and with this project's, which stays chosen.

    Raises:
        BackboneError: It does not run on token ids alone, does more in its attention than is computed here, or does not
            compute the same with the new function.
    """
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise BackboneError(f"{name} reads {model.main_input_name}, not token ids.", hint=_HINT)
    inputs = _inputs(model)
    no_cache = {"use_cache": False} if "use_cache" in inspect.signature(type(model).forward).parameters else {}
    try:
        before = model(**inputs, **no_cache)[0]
    except Exception as error:
        # Whatever it needs besides token ids, or finds wrong with its configuration.
        raise BackboneError(f"{name} does not run on token ids alone: {first_line(error)}", hint=_HINT) from error
    try:
        # Layers of its own (sparse encoders, routers) know only masks to be added, and not all mark causality.
        own = ATTENTIONS[attention if getattr(model, "_supports_sdpa", True) else "eager"]
        model.set_attn_implementation(own)
    except (ValueError, ImportError) as error:
        raise BackboneError(f"{name} cannot take another attention function: {error}", hint=_HINT) from error
    run = _trace(model, inputs, no_cache)
    values_of: dict[tuple[nn.Module, int], Tensor] = {}
    for call in run.calls:
        # A prefix has one value for a key.
        if not torch.equal(values_of.setdefault((call.module, call.key.data_ptr()), call.value), call.value):
            raise BackboneError(f"{name} attends twice in a layer, to different values of the same keys.", hint=_HINT)
        extra = {name for name, value in call.arguments.items() if not isinstance(value, bool | str | None)}
        if unknown := extra - _SUPPORTED_ARGUMENTS:
            raise BackboneError(f"{name} attends with {', '.join(sorted(unknown))}, unknown here.", hint=_HINT)
    mask = inputs.get("decoder_attention_mask", inputs["attention_mask"]).bool()
    # A funnel shortens its text.
    before, after = (x[mask].float() if x.shape[:2] == mask.shape else x.float() for x in (before, run.logits))
    if before.isnan().any():
        raise BackboneError(
            f"{name} computes NaN on a few tokens.",
            hint="its weights are damaged, or too large for their type: float32?",
        )
    if not float((after - before).norm()) <= 0.05 * float(before.norm()):
        raise BackboneError(
            f"{name} computes something else with another attention function: layers attend by code of their own.",
            hint=_HINT,
        )
    return run


def _inputs(model: Any) -> dict[str, Tensor]:
    """A row, the same with another last token, and one that is padded.

    The encoder and the decoder get different numbers of tokens, which tells their calls apart.
    """
    ids = torch.zeros(3, _DECODER_TOKENS, dtype=torch.long, device=main_device(model))
    ids[:, 1::2] = 1
    ids[1, -1] = model.get_input_embeddings().weight.shape[0] // 2
    mask = torch.ones_like(ids)
    mask[2, -2:] = 0
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids, "attention_mask": mask}
    source = {"input_ids": ids[:, :_ENCODER_TOKENS], "attention_mask": mask[:, :_ENCODER_TOKENS]}
    return {**source, "decoder_input_ids": ids, "decoder_attention_mask": mask}


def _trace(model: Any, inputs: dict[str, Tensor], no_cache: dict[str, Any]) -> _Run:
    """One pass with this project's attention: into a cache that forgets nothing, if the model takes it."""
    takes_cache = cache_argument(model) in inspect.signature(type(model).forward).parameters
    if takes_cache and not model.config.is_encoder_decoder:
        cache = growing_cache(model)
        with trace_calls(model) as calls, contextlib.suppress(*_CACHE_ERRORS):
            given = {cache_argument(model): cache, "use_cache": True}
            return _Run(calls, model(**inputs, **given)[0], cache)
    with trace_calls(model) as calls:
        return _Run(calls, model(**inputs, **no_cache)[0], None)


def _stack(model: Any, name: str, run: _Run) -> Layout:
    """The layout of a model with one stack of layers: an encoder or a decoder-only model."""
    calls, layers, types = run.calls, _layers(model, run.calls), _layer_types(model)
    # Whether changing a later token changes nothing at earlier ones.
    one, other = run.logits[:2, :-1].float()
    if not torch.allclose(one, other, rtol=1e-3, atol=1e-5 * float(one.abs().max())):
        layer_of, firsts, notes = _number_layers("encoder", calls, layers, types, name)
        return Layout({"encoder": _shapes(firsts)}, layer_of, "encoder", False, notes=notes)
    layer_of, firsts, notes = _number_layers("decoder", calls, layers, types, name)
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        raise BackboneError(f"{name} takes no position_ids, so that its text cannot start at position P.", hint=_HINT)
    _check_causal(model, calls, name)
    # State-space layers and short convolutions mix all positions of a row, whatever the mask.
    mixing = len(layer_of) < len(layers) or any(isinstance(m, nn.Conv1d) for layer in layers for m in layer.modules())
    if mixing:
        _check_padding(model, name)
    # A mask with weights that a model computes from its values covers the text alone.
    weighted = any(_adds_weights(call.mask) for call in calls)
    packable = not mixing and "chunked_attention" not in types and not weighted
    repeats = len(calls) > len({call.module for call in calls})
    # Prefix slots in the cache would shift the borders of chunks; a repeated layer has several entries in it.
    cache_layers = None if run.cache is None or not packable or repeats else _cache_layers(run.cache, firsts)
    shapes = _shapes(firsts)
    return Layout({"decoder": shapes}, layer_of, "decoder", packable, cache_layers, notes, repeats)


def _adds_weights(mask: Tensor | None) -> bool:
    """Whether a mask adds to scores, beyond hiding positions."""
    if mask is None or not mask.is_floating_point():
        return False
    return bool(((mask != 0) & (mask > 0.5 * torch.finfo(mask.dtype).min)).any())


def _check_causal(model: Any, calls: Sequence[AttentionCall], name: str) -> None:
    """Refuse a decoder whose attention relies on a mask that is left out where there is no padding."""
    left_out = model.config._attn_implementation == ATTENTIONS["sdpa"]
    if left_out and not all(getattr(call.module, "is_causal", True) for call in calls):
        raise BackboneError(f"the decoder of {name} does not mark its attention as causal.", hint=_HINT)


def _check_padding(model: Any, name: str) -> None:
    """Refuse a hybrid in which a row of a batch differs from the row by itself, in one pass or by steps.

    The row is padded on the left, and changes places with another between two steps, as beams do.
    """
    ids = torch.arange(4, device=main_device(model))[None]
    rows = torch.tensor([[1, 2, 0, 1, 2, 3], [5, 4, 3, 2, 1, 0]], device=ids.device)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6], device=ids.device)
    positions, swapped = positions_from_mask(mask), torch.tensor([1, 0], device=ids.device)
    expected = model(input_ids=ids, use_cache=False)[0][:, -2:].float()
    try:
        step = {"position_ids": positions[:, :-1], "attention_mask": mask[:, :-1], "use_cache": True}
        first = model(input_ids=rows[:, :-1], **step)
        step = {"position_ids": positions[swapped, -1:], "attention_mask": mask[swapped], "use_cache": True}
        cache = first[cache_argument(model)]
        cache.reorder_cache(swapped)
        second = model(input_ids=rows[swapped, -1:], **step, **{cache_argument(model): cache})
        logits = torch.cat([first[0][:1, -1:], second[0][1:]], dim=1).float()
        same = float((logits - expected).norm()) <= 0.05 * float(expected.norm())
    except (RuntimeError, KeyError, AttributeError):
        same = False
    if not same:
        raise BackboneError(f"{name} lets padding or the order of rows change what follows.", hint=_HINT)


def _layer_types(model: Any) -> Sequence[str]:
    """The layers' types, by the configuration; empty where it names none."""
    config = model.config.get_text_config(decoder=True)
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    return tuple(map(str, types))


def _layers(part: nn.Module, calls: Sequence[AttentionCall]) -> list[nn.Module]:
    """The stack of layers: the outermost list of modules that holds most of the attention layers."""
    stacks = [module for module in part.modules() if isinstance(module, nn.ModuleList)]
    attending = {call.module for call in calls}
    if not attending:
        return max((list(stack) for stack in stacks), key=len, default=[])
    return list(max(stacks, key=lambda stack: len(attending.intersection(stack.modules())), default=()))


def _number_layers(
    site: Site, calls: Sequence[AttentionCall], layers: Sequence[nn.Module], types: Sequence[str], name: str
) -> tuple[dict[nn.Module, tuple[Site, int]], list[AttentionCall], tuple[str, ...]]:
    """Number the attention layers of a site; layers that share an earlier one's keys get its number.

    Returns:
        Each layer's number, the call of each number's first layer, and notes for a user.

    Raises:
        BackboneError: A layer attends through code of its own.
    """
    attending = {call.module for call in calls}
    untraced = [n for n, layer in enumerate(layers) if not attending.intersection(layer.modules())]
    unknown = [n for n in untraced if n >= len(types) or not any(kind in types[n] for kind in _STATEFUL)]
    if not attending or unknown:
        raise BackboneError(
            f"{name} has {len(layers)} {site} layers, but {len(layers) - len(untraced)} of them attend through "
            "transformers' registry: a prefix would not reach the others.",
            hint=_HINT,
        )
    layer_of: dict[nn.Module, tuple[Site, int]] = {}
    firsts: dict[tuple[int, int], AttentionCall] = {}
    for call in calls:
        storage = (call.key.data_ptr(), call.value.data_ptr())
        if call.module not in layer_of:
            firsts.setdefault(storage, call)
            layer_of[call.module] = (site, list(firsts).index(storage))
    notes = []
    if len(calls) > len(attending):
        most = max(Counter(call.module for call in calls).values())
        notes.append(f"one {site} layer is run {most} times, each time with the same prefix")
    if untraced:
        kinds = ", ".join(sorted({types[n] for n in untraced}))
        count = len(layers) - len(untraced)
        notes.append(f"prefix at the attention layers only: {count} of {len(layers)} (the others: {kinds})")
    if shared := len(layer_of) - len(firsts):
        notes.append(f"{shared} layers share the keys and values of earlier ones, and so their prefix")
    return layer_of, list(firsts.values()), tuple(notes)


def _shapes(calls: Sequence[AttentionCall]) -> tuple[LayerShape, ...]:
    return tuple(LayerShape(call.key.shape[1], call.key.shape[3], call.value.shape[3]) for call in calls)


def _cache_layers(cache: Any, calls: Sequence[AttentionCall]) -> tuple[int, ...] | None:
    """Index of each call's keys and values in a cache; None where the cache keeps something else."""
    indices = [getattr(call.module, "layer_idx", number) for number, call in enumerate(calls)]
    for index, call in zip(indices, calls, strict=True):
        layer = cache.layers[index] if index < len(cache.layers) else None
        for name, tensor in (("keys", call.key), ("values", call.value)):
            kept = getattr(layer, name, None)
            if kept is None or not torch.equal(kept, tensor):
                return None
    return tuple(indices)


def _encoder_decoder(model: Any, name: str, run: _Run) -> Layout:
    """The layout of an encoder-decoder: every site at which all layers can have a prefix."""
    calls = run.calls
    encoder, decoder = model.get_encoder(), model.get_decoder()
    in_encoder = set(encoder.modules())
    encoder_calls = [call for call in calls if call.module in in_encoder]
    decoder_calls = [call for call in calls if call.module not in in_encoder]
    self_calls = [call for call in decoder_calls if call.key.shape[2] == _DECODER_TOKENS]
    cross_calls = [call for call in decoder_calls if call.key.shape[2] != _DECODER_TOKENS]
    _check_causal(model, self_calls, name)
    sites: dict[Site, tuple[Any, list[AttentionCall]]] = {
        "encoder": (encoder, encoder_calls),
        "decoder": (decoder, self_calls),
        "cross": (decoder, cross_calls),
    }
    layer_of: dict[nn.Module, tuple[Site, int]] = {}
    geometry: dict[Site, tuple[LayerShape, ...]] = {}
    notes: list[str] = []
    for site, (part, site_calls) in sites.items():
        try:
            numbered, firsts, site_notes = _number_layers(site, site_calls, _layers(part, site_calls), (), name)
        except BackboneError:
            notes.append(f"no site {site!r}: its layers attend through code of their own")
            continue
        layer_of |= numbered
        geometry[site] = _shapes(firsts)
        notes.extend(site_notes)
    if not geometry:
        raise BackboneError(f"{name} attends through code of its own: a prefix would not reach it.", hint=_HINT)
    positions = _takes_positions(encoder, encoder_calls) and _takes_positions(decoder, self_calls)
    windows = any(call.arguments.get("sliding_window") is not None for call in encoder_calls)
    packable = len(geometry) == len(sites) and positions and not windows
    return Layout(geometry, layer_of, "encoder-decoder", packable, notes=tuple(notes))


def _takes_positions(part: Any, calls: Sequence[AttentionCall]) -> bool:
    """Whether an encoder or decoder can get the positions of a packed row, or goes by distances alone."""
    embedding = getattr(part, "embed_positions", None)
    if embedding is not None:
        return "position_ids" in inspect.signature(type(embedding).forward).parameters
    return bool(calls) and all(call.arguments.get("position_bias") is not None for call in calls)
