"""One batch of transformers' `generate`, with prefixes.

transformers generates. It gets a cache that already holds the prefixes, or, if a model keeps no such cache
(encoder-decoders, latent attention, hybrids), the prefixes are injected in front of every attention. Beams, logits
processors and stopping are transformers' own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from prefixtune.attention.cache import cache_argument, growing_cache, prefilled_cache
from prefixtune.attention.injection import Injection, batch_prefixes, injecting
from prefixtune.attention.masks import cached_prefix_slots
from prefixtune.backbone.backbone import Backbone
from prefixtune.errors import ConfigError, PrefixError, first_line
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generation_config import to_generation_config
from prefixtune.prefix.prefix import Prefix
from prefixtune.sampling.detokenizer import StopStringCriterion, ids_until_stop
from prefixtune.sampling.grammar import compile_json_schema, constrain
from prefixtune.sampling.penalties import penalize, penalizes

__all__ = ["check_finite", "generate_batch", "penalty_processor", "put_prefixes", "refuse_not_finite", "seeded"]


@torch.inference_mode()
def generate_batch(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    prefixes: Sequence[Prefix | None],
    config: GenerateConfig,
    assistant: Backbone | None,
    streamer: Any,
    end_ids: Sequence[int],
) -> list[list[int]]:
    """Token ids that continue each prompt of one batch, B lists; they end before one of the end tokens."""
    arguments = _inputs(backbone, prompts)
    guessing = assistant is not None or config.prompt_lookup > 0
    prefix_context = put_prefixes(arguments, backbone, prefixes, config, guessing=guessing)
    start = 1 if backbone.kind == "encoder-decoder" else arguments["input_ids"].shape[1]
    if streamer is not None:
        arguments["streamer"] = streamer
    if assistant is not None:
        arguments["assistant_model"] = assistant.model
    _add_rules(arguments, backbone, prompts, config, start)
    with prefix_context, backbone.autocast(), _compiler_errors():
        output = backbone.model.generate(**arguments, generation_config=to_generation_config(backbone, config, end_ids))
    new = output[:, start:].tolist()
    ends = set(end_ids)
    rows = [row[: next((index for index, token in enumerate(row) if token in ends), len(row))] for row in new]
    return [ids_until_stop(backbone.decode, row, config.stop) for row in rows] if config.stop else rows


def put_prefixes(
    arguments: dict[str, Any],
    backbone: Backbone,
    prefixes: Sequence[Prefix | None],
    config: GenerateConfig,
    *,
    guessing: bool = False,
) -> contextlib.AbstractContextManager[Any]:
    """Put prefixes in front of a call of transformers' `generate`.

    Args:
        arguments: Of the call, with `input_ids` and `attention_mask`; changed in place. Where the prefixes are a
            prefilled cache, the ids get padding in front, as many as the longest prefix has positions.
        backbone: The frozen model.
        prefixes: One per row.
        config: Its beams are rows per text, and its cache is used.
        guessing: Tokens are guessed, and looked up in the ids, so that these may hold no padding for a prefix.

    Returns:
        A context for the call.
    """
    if any(prefix is not None and prefix.placement == "infix" for prefix in prefixes):
        return cached_prefix_slots(_prefill_infix(arguments, backbone, prefixes, config, guessing))
    if backbone.layout.cache_layers is not None and not guessing:
        return cached_prefix_slots(_prefill(arguments, backbone, prefixes, config))
    return injecting(_inject(arguments, backbone, prefixes, config))


@contextlib.contextmanager
def _compiler_errors() -> Iterator[None]:
    """Report a missing or failing compiler as such: nothing is wrong with the request."""
    try:
        yield
    except RuntimeError as error:
        from torch._dynamo.exc import BackendCompilerFailed

        if not isinstance(error, BackendCompilerFailed):
            raise
        raise ConfigError(
            f"the decoding step cannot be compiled here: {first_line(error)}.",
            hint="install a C++ compiler (on Debian and Ubuntu: apt install g++), or leave compile out.",
        ) from error


def _inputs(backbone: Backbone, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Ids and mask: padded on the left for a decoder-only model, on the right for an encoder."""
    longest = max(len(prompt) for prompt in prompts)
    left = backbone.kind == "decoder"
    ids, mask = [], []
    for prompt in prompts:
        padding = longest - len(prompt)
        pads, ones = [backbone.pad_id] * padding, [1] * len(prompt)
        ids.append([*pads, *prompt] if left else [*prompt, *pads])
        mask.append([0] * padding + ones if left else ones + [0] * padding)
    return {
        "input_ids": torch.tensor(ids, device=backbone.device),
        "attention_mask": torch.tensor(mask, device=backbone.device),
    }


def _prefill(
    arguments: dict[str, Any], backbone: Backbone, prefixes: Sequence[Prefix | None], config: GenerateConfig
) -> int:
    """Start generation from a cache that holds the prefixes; returns how many slots they take."""
    rows, length = arguments["input_ids"].shape
    width = max(0 if prefix is None else prefix.length() for prefix in prefixes)
    static_length = width + length + config.max_new_tokens if config.cache == "static" else None
    cache, slots = prefilled_cache(
        backbone.model, backbone.layout, prefixes, repeats=config.num_beams, static_length=static_length
    )
    if width:
        # transformers counts the cached prefix slots in ids and mask.
        pads = torch.full((rows, width), backbone.pad_id, device=backbone.device)
        arguments["input_ids"] = torch.cat([pads, arguments["input_ids"]], dim=1)
        arguments["attention_mask"] = torch.cat([slots.long(), arguments["attention_mask"]], dim=1)
    if width or static_length is not None:
        arguments[cache_argument(backbone.model)] = cache
    return width


def _prefill_infix(
    arguments: dict[str, Any],
    backbone: Backbone,
    prefixes: Sequence[Prefix | None],
    config: GenerateConfig,
    guessing: bool,
) -> int:
    """Start from a cache that holds the infixes, and the sources, which do not see them; returns the infixes' slots.

    The prompt's last token is not in it: it is the first that sees the infix, as in training.
    """
    if backbone.layout.cache_layers is None or guessing or config.cache != "dynamic":
        raise ConfigError(
            "an infix needs a dynamic cache that can be prefilled, and no prompt look-up or assistant.",
            hint="leave cache, prompt_lookup and the assistant out, or use a prefix.",
        )
    ids, mask = arguments["input_ids"], arguments["attention_mask"]
    cache = growing_cache(backbone.model)
    if ids.shape[1] > 1:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        name = cache_argument(backbone.model)
        backbone.model(
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=positions[:, :-1],
            use_cache=True,
            **{name: cache},
        )
    width = _prefill(arguments, backbone, prefixes, config)
    prefilled = arguments[cache_argument(backbone.model)]
    if ids.shape[1] > 1:
        for index in backbone.layout.cache_layers or ():
            layer = cache.layers[index]
            repeated = (part.repeat_interleave(config.num_beams, dim=0) for part in (layer.keys, layer.values))
            prefilled.update(*repeated, index)
    return width


def _inject(
    arguments: dict[str, Any], backbone: Backbone, prefixes: Sequence[Prefix | None], config: GenerateConfig
) -> Injection:
    """Injects the prefixes in front of every attention; positions and cache are set to match."""
    if backbone.kind == "decoder":
        shift = torch.tensor([0 if p is None else p.length() for p in prefixes], device=backbone.device)
        counted = (arguments["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        arguments["position_ids"] = counted + shift[:, None]
        if backbone.layout.cache_layers is not None:
            arguments[cache_argument(backbone.model)] = growing_cache(backbone.model)
    elif config.cache == "dynamic":
        from transformers import DynamicCache, EncoderDecoderCache

        # transformers' own cache is as deep as the encoder, which fails if the decoder is deeper.
        arguments[cache_argument(backbone.model)] = EncoderDecoderCache(DynamicCache(), DynamicCache())
    return batch_prefixes(prefixes, backbone.layout, backbone.dtype, backbone.device)


def _add_rules(
    arguments: dict[str, Any],
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig,
    start: int,
) -> None:
    """Stop strings and penalties of each row's own text, without padding, prefix slots and other rows; and a check."""
    from transformers import LogitsProcessorList, StoppingCriteriaList

    if config.stop:
        arguments["stopping_criteria"] = StoppingCriteriaList(
            [StopStringCriterion(backbone.decode, config.stop, start)]
        )
    processors = LogitsProcessorList([refuse_not_finite])
    if penalizes(config):
        processors.append(penalty_processor(backbone, prompts, config, start))
    if config.response_schema:
        begin = start if backbone.forced_bos_id is None else start + 1
        grammar = compile_json_schema(backbone, config.response_schema)
        processors.append(constrain(grammar, begin, backbone.eos_id, backbone.pad_id))
    arguments["logits_processor"] = processors


def refuse_not_finite(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A logits processor of transformers that changes nothing; the first one, as others set scores to -inf.

    Raises:
        PrefixError: A row has no highest score.
    """
    check_finite(scores)
    return scores


def check_finite(scores: torch.Tensor) -> None:
    """Refuse rows of scores in which none is the highest: one is NaN or inf, or all are -inf.

    Raises:
        PrefixError: There is one.
    """
    if not bool(torch.isfinite(scores.amax(dim=-1)).all()):
        from prefixtune.engine.sampler import NOT_FINITE

        raise PrefixError(NOT_FINITE, hint="use another prefix, or load the model in bfloat16 or float32.")


def penalty_processor(
    backbone: Backbone, prompts: Sequence[Sequence[int]], config: GenerateConfig, start: int
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The penalties on each row's own text; transformers' own would count padding and prefix slots.

    Args:
        backbone: The frozen model.
        prompts: Token ids that count as said; an encoder-decoder's do not.
        config: The penalties, and with `num_beams` the rows per prompt.
        start: Where generated tokens begin in the ids.
    """
    in_prompt: torch.Tensor | None = None

    def apply(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        nonlocal in_prompt
        if in_prompt is None:
            in_prompt = torch.zeros_like(scores, dtype=torch.bool)
            # An encoder-decoder may repeat its source.
            if backbone.kind == "decoder":
                for row in range(len(scores)):
                    in_prompt[row, list(prompts[row // config.num_beams])] = True
        new = input_ids[:, start:]
        counts = torch.zeros_like(scores, dtype=torch.int32)
        counts.scatter_add_(1, new, torch.ones_like(new, dtype=torch.int32))
        return penalize(scores, config, in_prompt | (counts > 0), counts)

    return apply


@contextlib.contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Sample from `seed`, then restore torch's random state; None: leave it alone.

    The state is the process's: what other threads sample meanwhile, transformers' loop does not sample.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else [], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield
