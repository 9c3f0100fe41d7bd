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

from prefixtune.attention.cache import cache_argument, prefilled_cache
from prefixtune.attention.injection import Injection, batch_prefixes, injecting
from prefixtune.attention.masks import cached_prefix_slots
from prefixtune.backbone.backbone import Backbone
from prefixtune.errors import PrefixError
from prefixtune.inference.config import GenerateConfig
from prefixtune.prefix.prefix import Prefix
from prefixtune.sampling.config import LOWEST_TEMPERATURE
from prefixtune.sampling.detokenizer import StopStringCriterion, ids_until_stop
from prefixtune.sampling.grammar import compile_json_schema, constrain
from prefixtune.sampling.penalties import penalize, penalizes

__all__ = ["check_finite", "generate_batch", "newline_tokens", "seeded", "to_generation_config"]


@torch.inference_mode()
def generate_batch(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    prefixes: Sequence[Prefix | None],
    config: GenerateConfig,
    streamer: Any,
    end_ids: Sequence[int],
) -> list[list[int]]:
    """Token ids that continue each prompt of one batch, B lists; they end before one of the end tokens."""
    arguments = _inputs(backbone, prompts)
    prefix_context = _put_prefixes(arguments, backbone, prefixes, config)
    start = 1 if backbone.kind == "encoder-decoder" else arguments["input_ids"].shape[1]
    if streamer is not None:
        arguments["streamer"] = streamer
    _add_rules(arguments, backbone, prompts, config, start)
    with prefix_context, backbone.autocast():
        output = backbone.model.generate(**arguments, generation_config=to_generation_config(backbone, config, end_ids))
    new = output[:, start:].tolist()
    ends = set(end_ids)
    rows = [row[: next((index for index, token in enumerate(row) if token in ends), len(row))] for row in new]
    return [ids_until_stop(backbone.decode, row, config.stop) for row in rows] if config.stop else rows


def _put_prefixes(
    arguments: dict[str, Any], backbone: Backbone, prefixes: Sequence[Prefix | None], config: GenerateConfig
) -> contextlib.AbstractContextManager[Any]:
    """Put prefixes in front of a call of transformers' `generate`.

    Args:
        arguments: Of the call, with `input_ids` and `attention_mask`; changed in place. Where the prefixes are a
            prefilled cache, the ids get padding in front, as many as the longest prefix has positions.
        backbone: The frozen model.
        prefixes: One per row.
        config: Its beams are rows per text.

    Returns:
        A context for the call.
    """
    if backbone.layout.cache_layers is not None:
        return cached_prefix_slots(_prefill(arguments, backbone, prefixes, config))
    return injecting(_inject(arguments, backbone, prefixes))


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
    rows = len(arguments["input_ids"])
    width = max(0 if prefix is None else prefix.length() for prefix in prefixes)
    cache, slots = prefilled_cache(backbone.model, backbone.layout, prefixes, repeats=config.num_beams)
    if width:
        # transformers counts the cached prefix slots in ids and mask.
        pads = torch.full((rows, width), backbone.pad_id, device=backbone.device)
        arguments["input_ids"] = torch.cat([pads, arguments["input_ids"]], dim=1)
        arguments["attention_mask"] = torch.cat([slots.long(), arguments["attention_mask"]], dim=1)
        arguments[cache_argument(backbone.model)] = cache
    return width


def _inject(arguments: dict[str, Any], backbone: Backbone, prefixes: Sequence[Prefix | None]) -> Injection:
    """Injects the prefixes in front of every attention; positions and cache are set to match."""
    if backbone.kind == "decoder":
        shift = torch.tensor([0 if p is None else p.length() for p in prefixes], device=backbone.device)
        counted = (arguments["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        arguments["position_ids"] = counted + shift[:, None]
    else:
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
    # The first one, as others set scores to -inf.
    processors = LogitsProcessorList([_refuse_not_finite])
    if penalizes(config):
        processors.append(_penalty_processor(backbone, prompts, config, start))
    if config.response_schema:
        begin = start if backbone.forced_bos_id is None else start + 1
        grammar = compile_json_schema(backbone, config.response_schema)
        processors.append(constrain(grammar, begin, backbone.eos_id, backbone.pad_id))
    arguments["logits_processor"] = processors


def _refuse_not_finite(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
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


def _penalty_processor(
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


def to_generation_config(backbone: Backbone, config: GenerateConfig, end_ids: Sequence[int] = ()) -> Any:
    """Transformers' `GenerationConfig`; nothing in it comes from the model's own one.

    Args:
        backbone: The frozen model.
        config: How to decode.
        end_ids: The tokens that end a text; empty: the tokenizer's end token.
    """
    from transformers import GenerationConfig

    values: dict[str, Any] = {
        "max_new_tokens": config.max_new_tokens,
        "num_beams": config.num_beams,
        "do_sample": config.temperature > 0,
        "pad_token_id": backbone.pad_id,
        "eos_token_id": list(end_ids) if len(end_ids) > 1 else backbone.eos_id,
        "use_cache": True,
        "disable_compile": True,
    }
    if backbone.kind == "encoder-decoder":
        values["decoder_start_token_id"] = backbone.decoder_start_id
        if backbone.forced_bos_id is not None:
            values["forced_bos_token_id"] = backbone.forced_bos_id
    if config.min_new_tokens:
        values["min_new_tokens"] = config.min_new_tokens
    if config.num_beams > 1:
        values["length_penalty"] = config.length_penalty
    if config.temperature > 0:
        temperature = max(config.temperature, LOWEST_TEMPERATURE)
        values |= {"temperature": temperature, "top_k": config.top_k, "top_p": config.top_p}
        if config.min_p:
            values["min_p"] = config.min_p
    if config.ban_newlines:
        values["suppress_tokens"] = newline_tokens(backbone)
    return GenerationConfig(**values)


def newline_tokens(backbone: Backbone) -> list[int]:
    """Every token whose text has a line break."""
    tokens: list[int] | None = backbone.tokenizer_cache.get("newline_tokens")
    if tokens is None:
        size = min(backbone.vocab_size, len(backbone.tokenizer))
        texts = backbone.tokenizer.batch_decode([[token] for token in range(size)])
        tokens = [token for token, text in enumerate(texts) if "\n" in text or "\r" in text]
        backbone.tokenizer_cache["newline_tokens"] = tokens
    return tokens
