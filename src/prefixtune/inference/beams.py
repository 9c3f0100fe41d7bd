"""Texts by transformers' `generate`, with prefixes: beam search, and models that the engine cannot run.

The prefixes are injected in front of every attention; beams, their scores and their end are transformers' own.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.attention.injection import batch_prefixes, injecting
from prefixtune.attention.layout import cache_argument
from prefixtune.backbone.backbone import Backbone
from prefixtune.engine.sampler import NOT_FINITE, TokenCounts, penalizes
from prefixtune.errors import PrefixError
from prefixtune.inference.config import GenerateConfig, texts_at_once
from prefixtune.inference.prompts import Prompt, newline_tokens
from prefixtune.sampling.config import LOWEST_TEMPERATURE


def search(
    backbone: Backbone, prompts: Sequence[Prompt], numbers: Sequence[int], config: GenerateConfig
) -> Iterator[tuple[int, list[int]]]:
    """Continue prompts in batches: of each its index, and its tokens without the end token.

    A row that has a stop string ends; the tokens behind the string are not cut.

    Args:
        backbone: The frozen model.
        prompts: All of a call.
        numbers: Indices of those to continue.
        config: How to decode. Each batch has its own seed.
    """

    def shared(number: int) -> tuple[int, tuple[int, ...], int]:
        """What all texts of a batch have alike; in order, the longest outputs come first."""
        # One that may pass LongRoPE's limit is alone: it would turn the keys of the others.
        prompt = prompts[number]
        return -prompt.new_tokens, prompt.ends, number if prompt.passes(backbone.longrope_limit) else -1

    # What a batch draws depends on all of its texts, so that a part of the texts is computed in the batches of all.
    computed = range(len(prompts)) if config.temperature > 0 and config.seed is not None else numbers
    order = sorted(computed, key=lambda number: (shared(number), len(prompts[number].ids)))
    wanted, batch = set(numbers), itertools.count()
    for _, same in itertools.groupby(order, shared):
        while rows := list(itertools.islice(same, texts_at_once(config.batch_size))):
            seed = seed_of(config.seed, next(batch))
            if not wanted.isdisjoint(rows):
                with _seeded(seed, backbone.device):
                    found = _search_batch(backbone, prompts, rows, config)
                yield from ((row, ids) for row, ids in zip(rows, found, strict=True) if row in wanted)


@torch.inference_mode()
def _search_batch(
    backbone: Backbone, all_prompts: Sequence[Prompt], rows: Sequence[int], config: GenerateConfig
) -> list[list[int]]:
    """The tokens that continue the prompts of one batch, which end alike."""
    prompts = [all_prompts[row] for row in rows]
    from transformers import DynamicCache, EncoderDecoderCache, LogitsProcessorList, StoppingCriteriaList

    ids, mask = _pad(backbone, [prompt.ids for prompt in prompts])
    start = 1 if backbone.kind == "encoder-decoder" else ids.shape[1]
    arguments: dict[str, Any] = {}
    if backbone.kind == "decoder":
        shift = torch.tensor([prompt.prefix_length for prompt in prompts], device=backbone.device)
        arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0) + shift[:, None]
    else:
        # transformers' own cache is as deep as the encoder, which fails if the decoder is deeper.
        arguments[cache_argument(backbone.model)] = EncoderDecoderCache(DynamicCache(), DynamicCache())
    injection = batch_prefixes([prompt.prefix for prompt in prompts], backbone.layout, backbone.dtype, backbone.device)
    with injecting(injection), backbone.autocast():
        output = backbone.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=_generation_config(backbone, config, prompts[0]),
            logits_processor=LogitsProcessorList([_processor(backbone, prompts, rows, config, start)]),
            stopping_criteria=StoppingCriteriaList([_stopping(backbone, config, start)] if config.stop else []),
            **arguments,
        )
    ends = {backbone.eos_id, *prompts[0].ends}
    return [list(itertools.takewhile(lambda token: token not in ends, row)) for row in output[:, start:].tolist()]


def _pad(backbone: Backbone, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask, (B, T): padded on the left for a decoder-only model, on the right for an encoder."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), backbone.pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        place = slice(longest - len(prompt), longest) if backbone.kind == "decoder" else slice(len(prompt))
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    return ids.to(backbone.device), mask.to(backbone.device)


def _processor(
    backbone: Backbone, prompts: Sequence[Prompt], rows: Sequence[int], config: GenerateConfig, start: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """What sees each step's scores, (B * beams, V): a check, and the penalties on each row's own text."""
    texts = [row for row in rows for _ in range(config.num_beams)]

    def process(input_ids: Tensor, scores: Tensor) -> Tensor:
        check_finite(scores, texts)
        if penalizes(config):
            scores = scores.clone()
            for row, new in enumerate(input_ids[:, start:].tolist()):
                # An encoder-decoder may repeat its source. transformers' own penalty would count padding.
                prompt = prompts[row // config.num_beams].ids if backbone.kind == "decoder" else ()
                TokenCounts(prompt, scores[row]).penalize(scores[row], config, new)
        return scores

    return process


def _stopping(backbone: Backbone, config: GenerateConfig, start: int) -> Callable[..., Tensor]:
    """What ends a row: a stop string in its generated text."""

    def stopped(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        texts = [backbone.decode(row) for row in input_ids[:, start:].tolist()]
        return torch.tensor([any(stop in text for stop in config.stop) for text in texts], device=input_ids.device)

    return stopped


def check_finite(scores: Float[Tensor, "rows V"], texts: Sequence[int]) -> None:
    """Refuse rows of scores in which none is the highest: one is NaN or inf, or all are -inf.

    Args:
        scores: Some rows.
        texts: Of each row, the index of its text.

    Raises:
        PrefixError: There is one; the message names its text.
    """
    broken = (~torch.isfinite(scores.amax(dim=-1))).nonzero().flatten().tolist()
    if broken:
        hint = "use another prefix, or load the model in bfloat16 or float32."
        raise PrefixError(f"text {texts[broken[0]] + 1}: {NOT_FINITE}", hint=hint)


def seed_of(seed: int | None, number: int) -> int | None:
    """A text's or a batch's own: of the first one the seed itself, as for a request to the engine with it."""
    return seed if seed is None or number == 0 else random.Random(f"{seed}/{number}").getrandbits(62)


_RANDOM = threading.Lock()


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Sample from `seed`, then restore torch's random state, which all threads share; None: leave it alone."""
    with _RANDOM, torch.random.fork_rng(devices=[device] if device.type == "cuda" else [], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def _generation_config(backbone: Backbone, config: GenerateConfig, prompt: Prompt) -> Any:
    """Transformers' `GenerationConfig` for texts that end as this one; nothing in it comes from the model's own one."""
    from transformers import GenerationConfig

    values: dict[str, Any] = {
        "max_new_tokens": prompt.new_tokens,
        "min_new_tokens": min(config.min_new_tokens, prompt.new_tokens) or None,
        "num_beams": config.num_beams,
        "do_sample": config.temperature > 0,
        "pad_token_id": backbone.pad_id,
        "eos_token_id": [backbone.eos_id, *prompt.ends],
        "use_cache": True,
        "disable_compile": True,
    }
    if backbone.kind == "encoder-decoder":
        values["decoder_start_token_id"] = backbone.decoder_start_id
        values["forced_bos_token_id"] = backbone.forced_bos_id
    if config.num_beams > 1:
        values["length_penalty"] = config.length_penalty
    if config.temperature > 0:
        values["temperature"] = max(config.temperature, LOWEST_TEMPERATURE)
        values |= {"top_k": config.top_k, "top_p": config.top_p, "min_p": config.min_p or None}
    if config.ban_newlines:
        values["suppress_tokens"] = newline_tokens(backbone)
    return GenerationConfig(**values)
