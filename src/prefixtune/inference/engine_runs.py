"""Generation by the engine, for models whose whole step is one call of compiled code.

Texts join and leave the batch one by one, so that none waits for the longest of a batch. What the engine does not do
(beams, guessed tokens, infixes), and every other model, is for transformers' loop (`decoding`).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.native.norm import norm_kernel
from prefixtune.backbone.native.panels import panel_kernel
from prefixtune.backbone.prepack import prepack
from prefixtune.errors import RequestError
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generation_config import newline_tokens
from prefixtune.prefix.prefix import Prefix
from prefixtune.sampling.config import SamplingConfig
from prefixtune.sampling.grammar import compile_json_schema

# The engine is imported where it runs: a few tokens, and other models, do without it.
if TYPE_CHECKING:
    from prefixtune.engine.engine import Engine
    from prefixtune.engine.request import Request, SequenceOutput

__all__ = ["FEW_TOKENS", "Text", "packed_backbone", "run_in_engine", "suits_engine", "texts_at_once"]


_LOADING_SECONDS = 0.5
"""How long a text waits for compiled code: enough to load it, not to compile it."""
_COMPILER_SECONDS = 60.0
"""The same if texts must be the same the next time, when it is there."""
FEW_TOKENS = 16
"""Fewer are generated in less time than laying out the matrices takes."""
_SHARE_OF_MEMORY = 0.25
"""Of the free memory that a second copy of the matrices may take."""
_BATCHES = 8
"""Of texts that are saved together."""
_SAMPLED = 2
"""About how many numbers along each dimension of a weight a change is noticed by."""
_WAITING = 64
"""Texts that wait in the engine for a slot; the others wait here, as token ids."""

_Weights = tuple[tuple[int, int, int, bytes], ...]

_packed: weakref.WeakKeyDictionary[Backbone, tuple[_Weights, Backbone | None]] = weakref.WeakKeyDictionary()
"""Backbone -> its weights as they were, and the prepacked one; None: its step is not computed by compiled code."""
_lock = threading.Lock()


class Text(NamedTuple):
    """A text to generate.

    Attributes:
        prompt: Token ids.
        prefix: In front of them.
        new_tokens: Most tokens to generate.
        ends: The tokens, besides the tokenizer's end token, at which it ends.
    """

    prompt: Sequence[int]
    prefix: Prefix | None
    new_tokens: int
    ends: tuple[int, ...]


def suits_engine(config: GenerateConfig, prefixes: Sequence[Prefix | None], assistant: Backbone | None) -> bool:
    """Whether the engine decodes in this way."""
    return (
        assistant is None
        and config.num_beams == 1
        and not config.prompt_lookup
        and config.cache == "dynamic"
        and all(prefix is None or prefix.placement == "front" for prefix in prefixes)
    )


def packed_backbone(backbone: Backbone, num_tokens: int, *, patient: bool = False) -> Backbone | None:
    """The backbone as the engine runs it, made once; None: compiled code does not compute its step, or not yet.

    It has a second copy of the matrices, unless that would take more than a quarter of the free memory.

    Args:
        backbone: The frozen model.
        num_tokens: Most tokens that will be generated; for a few it is not made.
        patient: Make it for a few as well, and wait for the compiler.
    """
    if backbone not in _packed and not (patient or num_tokens >= FEW_TOKENS):
        return None
    from prefixtune.engine.decoder_layers import may_have_layers

    if not may_have_layers(backbone):
        return None
    weights = describe_weights(backbone)
    with _lock:
        known = _packed.get(backbone)
        if known is None or known[0] != weights:
            # Weights that changed since are not in the copy.
            _packed.pop(backbone, None)
            if not _is_compiled(patient):
                return None
            known = _packed[backbone] = weights, _pack(backbone)
    return known[1]


@torch.inference_mode()
def describe_weights(backbone: Backbone) -> _Weights:
    """What is another one after a change of the model's weights: which they are, where they lie, and some numbers.

    A change of a few numbers through `.data`, of which torch keeps no account, may be missed.
    """
    facts = []
    for weight in backbone.model.parameters():
        version = 0 if weight.is_inference() else weight._version
        if type(weight) is not torch.nn.Parameter or not weight.numel():
            facts.append((id(weight), version, 0, b""))
            continue
        # Of every dimension, so that no more than these are copied, however the numbers lie.
        some = weight.detach()[tuple(slice(None, None, max(1, size // _SAMPLED)) for size in weight.shape)]
        numbers = some.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)
        facts.append((id(weight), version, weight.data_ptr(), numbers.numpy().tobytes()))
    return tuple(facts)


def _is_compiled(patient: bool) -> bool:
    """Whether all compiled code is there; starts to make it."""
    from prefixtune.engine.native import load_kernel
    from prefixtune.engine.native.decoder import decoder_kernel

    seconds = _COMPILER_SECONDS if patient else _LOADING_SECONDS
    # First, since the others are for nothing where it gains nothing or there is no compiler.
    if panel_kernel(seconds) is None:
        return False
    load_kernel()
    others: list[Future[Any]] = [decoder_kernel(), norm_kernel()]
    return not wait(others, seconds).not_done and load_kernel(seconds) is not None


def _pack(backbone: Backbone) -> Backbone | None:
    from prefixtune.engine.decoder_layers import find_layers
    from prefixtune.engine.decoder_step import DecoderStep
    from prefixtune.engine.native import load_kernel
    from prefixtune.engine.native.decoder import decoder_kernel

    kernel, attention = decoder_kernel().result(), load_kernel()
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in backbone.model.parameters())
    if kernel is None or attention is None or num_bytes > _SHARE_OF_MEMORY * psutil.virtual_memory().available:
        return None
    packed = prepack(backbone)
    # A dictionary that holds its own key would keep it for good.
    layers = None if packed is backbone else find_layers(packed)
    agrees = layers is not None and DecoderStep.make(packed, layers, kernel, attention) is not None
    return packed if agrees else None


def texts_at_once(backbone: Backbone, prefixes: Sequence[Prefix | None], config: GenerateConfig) -> int:
    """How many texts to give `generate` at once where outputs are saved in between.

    A batch; where texts join and leave it one by one, several, since it is full until the last one begins.
    """
    compiled = suits_engine(config, prefixes, None) and packed_backbone(backbone, FEW_TOKENS) is not None
    return config.batch_size * (_BATCHES if compiled else 1)


def run_in_engine(
    backbone: Backbone,
    texts: Mapping[int, Text],
    config: GenerateConfig,
    streamer: Any = None,
) -> Iterator[tuple[int, list[int]]]:
    """Each text's number and what follows its prompt, without the end token, as they end.

    Texts that the engine cannot finish are missing.

    Args:
        backbone: The packed one.
        texts: By number.
        config: How to decode; `batch_size` texts run at once.
        streamer: Of transformers, for a single text.

    Raises:
        RequestError: A text failed whose beginning the streamer has.
    """
    from prefixtune.engine.config import MAX_SLOTS
    from prefixtune.engine.engine import Engine

    num_slots = min(config.batch_size, len(texts), MAX_SLOTS)
    engine = Engine(backbone, num_slots=num_slots, max_waiting=_WAITING, prepack=False)
    requests = _requests(engine, texts, config)
    running: dict[str, tuple[int, list[int]]] = {}
    more = True
    while more or engine.busy:
        while more and engine.num_waiting < _WAITING:
            number, request = next(requests, (0, None))
            more = request is not None
            if request is not None:
                running[request.id] = number, []
                engine.add(request)
        for output in engine.step():
            number, ids = running[output.request_id]
            new = [token.id for token in output.tokens]
            if streamer is not None:
                _stream(streamer, texts[number].prompt, ids, new, output)
            ids += new
            if output.finish_reason is not None:
                del running[output.request_id]
            if output.finish_reason in ("stop", "length"):
                yield number, ids


def _stream(
    streamer: Any, prompt: Sequence[int], before: Sequence[int], new: Sequence[int], output: SequenceOutput
) -> None:
    """Give the only text's new tokens to a streamer of transformers, which expects the prompt first.

    Raises:
        RequestError: The text ended by an error, and its beginning is given away.
    """
    failed = output.finish_reason == "error"
    if failed and before:
        raise RequestError(f"the text cannot be continued: {output.error}", hint="try another text, prefix or setting.")
    if not before and not failed:
        streamer.put(torch.tensor(prompt))
    if new:
        streamer.put(torch.tensor(new))
    if output.finish_reason is not None and not failed:
        streamer.end()


def _requests(engine: Engine, texts: Mapping[int, Text], config: GenerateConfig) -> Iterator[tuple[int, Request]]:
    """Each text's number and request; those that are too long for the engine are left out."""
    from prefixtune.engine.request import Request, SamplingParams

    shared = {name: getattr(config, name) for name in SamplingConfig.model_fields if name != "seed"}
    shared["banned"] = newline_tokens(engine.backbone) if config.ban_newlines else ()
    grammar = compile_json_schema(engine.backbone, config.response_schema) if config.response_schema else None
    # Of torch's own random state only where no seed is given: other threads draw from it, too.
    draws = None if config.seed is None else torch.Generator().manual_seed(config.seed)
    known: dict[tuple[int, tuple[int, ...]], SamplingParams] = {}
    for number, text in texts.items():
        limit, prefix = text.new_tokens, text.prefix
        if engine.available_tokens(len(text.prompt), 0 if prefix is None else prefix.length()) < limit:
            continue
        sampling = known.get((limit, text.ends))
        if sampling is None:
            own = {"max_new_tokens": limit, "min_new_tokens": min(config.min_new_tokens, limit), "end_ids": text.ends}
            sampling = known[limit, text.ends] = SamplingParams(**{**shared, **own})
        if config.temperature > 0:
            sampling = sampling.replace(seed=int(torch.randint(2**62, (), generator=draws)))
        yield number, Request(tuple(text.prompt), prefix, sampling, grammar=grammar)
