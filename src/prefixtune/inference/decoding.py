"""Decoding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from prefixtune.attention.cache import cache_argument, growing_cache, prefilled_cache
from prefixtune.attention.injection import Injection, batch_prefixes, injecting
from prefixtune.attention.masks import cached_prefix_slots
from prefixtune.backbone.backbone import Backbone
from prefixtune.errors import ConfigError
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.detokenizer import StopStringCriterion, ids_until_stop
from prefixtune.prefix.prefix import Prefix

__all__ = ["generate_batch", "sampling_seed"]


@torch.inference_mode()
def generate_batch(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    prefixes: Sequence[Prefix | None],
    config: GenerateConfig,
    assistant: Backbone | None,
    streamer: Any,
) -> list[list[int]]:
    """Token ids that continue each prompt of one batch, (B,) lists; ended at the end token."""
    arguments = _inputs(backbone, prompts)
    guessing = assistant is not None or config.prompt_lookup > 0
    if any(prefix is not None and prefix.placement == "infix" for prefix in prefixes):
        ours = cached_prefix_slots(_prefill_infix(arguments, backbone, prefixes, config, guessing))
    # Guessed tokens come from the ids, among which a prefilled cache's slots would stand.
    elif backbone.layout.cache_layers is not None and not guessing:
        ours = cached_prefix_slots(_prefill(arguments, backbone, prefixes, config))
    else:
        ours = injecting(_inject(arguments, backbone, prefixes, config))
    start = 1 if backbone.kind == "encoder-decoder" else arguments["input_ids"].shape[1]
    if streamer is not None:
        arguments["streamer"] = streamer
    if assistant is not None:
        arguments["assistant_model"] = assistant.model
    _own_rules(arguments, backbone, prompts, config, start)
    with ours, backbone.autocast(), _compiler_errors():
        output = backbone.model.generate(**arguments, generation_config=_transformers_config(backbone, config))
    new = output[:, start:].tolist()
    rows = [row[: row.index(backbone.eos_id)] if backbone.eos_id in row else row for row in new]
    return [ids_until_stop(backbone.decode, row, config.stop) for row in rows] if config.stop else rows


@contextlib.contextmanager
def _compiler_errors() -> Iterator[None]:
    """Report a compiler that is missing or fails as what it is: nothing is wrong with the request."""
    try:
        yield
    except RuntimeError as error:
        from torch._dynamo.exc import BackendCompilerFailed

        if not isinstance(error, BackendCompilerFailed):
            raise
        raise ConfigError(
            f"the decoding step cannot be compiled here: {str(error).strip().splitlines()[0]}.",
            hint="install a C++ compiler (on Debian and Ubuntu: apt install g++), or leave compile out.",
        ) from error


def _inputs(backbone: Backbone, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Ids and mask: padded on the left where the model continues them, on the right where an encoder reads them."""
    longest = max(len(prompt) for prompt in prompts)
    left = backbone.kind == "decoder"
    ids, mask = [], []
    for prompt in prompts:
        padding = longest - len(prompt)
        filled, real = [backbone.pad_id] * padding, [1] * len(prompt)
        ids.append([*filled, *prompt] if left else [*prompt, *filled])
        mask.append([0] * padding + real if left else real + [0] * padding)
    return {
        "input_ids": torch.tensor(ids, device=backbone.device),
        "attention_mask": torch.tensor(mask, device=backbone.device),
    }


def _prefill(
    arguments: dict[str, Any], backbone: Backbone, prefixes: Sequence[Prefix | None], config: GenerateConfig
) -> int:
    """Put the prefixes into the cache that generation starts from; returns how many slots they take."""
    rows, length = arguments["input_ids"].shape
    width = max(0 if prefix is None else prefix.length() for prefix in prefixes)
    room = width + length + config.max_new_tokens if config.cache == "static" else None
    cache, slots = prefilled_cache(
        backbone.model, backbone.layout, prefixes, repeats=config.num_beams, static_length=room
    )
    if width:
        # The prefix's slots are already in the cache; transformers wants to see them in ids and mask all the same.
        front = torch.full((rows, width), backbone.pad_id, device=backbone.device)
        arguments["input_ids"] = torch.cat([front, arguments["input_ids"]], dim=1)
        arguments["attention_mask"] = torch.cat([slots.long(), arguments["attention_mask"]], dim=1)
    if width or room is not None:
        arguments[cache_argument(backbone.model)] = cache
    return width


def _prefill_infix(
    arguments: dict[str, Any],
    backbone: Backbone,
    prefixes: Sequence[Prefix | None],
    config: GenerateConfig,
    guessing: bool,
) -> int:
    """Put the infixes into the cache, and the sources, which do not see them; returns how many slots infixes take.

    The prompt's last token stays outside: it is the first that sees the infix, as in training.
    """
    if backbone.layout.cache_layers is None or guessing or config.cache != "dynamic":
        raise ConfigError(
            "an infix is decoded with a dynamic cache that can be filled, and without guessing.",
            hint="leave cache, prompt_lookup and the assistant as they are, or use a prefix.",
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
    filled = arguments[cache_argument(backbone.model)]
    if ids.shape[1] > 1:
        for number in backbone.layout.cache_layers or ():
            layer = cache.layers[number]
            repeated = (part.repeat_interleave(config.num_beams, dim=0) for part in (layer.keys, layer.values))
            filled.update(*repeated, number)
    return width


def _inject(
    arguments: dict[str, Any], backbone: Backbone, prefixes: Sequence[Prefix | None], config: GenerateConfig
) -> Injection:
    """What puts the prefixes in front of every attention, with positions and cache to match."""
    if backbone.kind == "decoder":
        shift = torch.tensor([0 if p is None else p.length() for p in prefixes], device=backbone.device)
        counted = (arguments["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        arguments["position_ids"] = counted + shift[:, None]
        if backbone.layout.cache_layers is not None:
            arguments[cache_argument(backbone.model)] = growing_cache(backbone.model)
    elif config.cache == "dynamic":
        from transformers import DynamicCache, EncoderDecoderCache

        # transformers' own is as deep as the encoder, which fails where the decoder is deeper.
        arguments[cache_argument(backbone.model)] = EncoderDecoderCache(DynamicCache(), DynamicCache())
    return batch_prefixes(prefixes, backbone.layout, backbone.dtype, backbone.device)


def _own_rules(
    arguments: dict[str, Any],
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig,
    start: int,
) -> None:
    """Stopping and penalties that look at a row's own tokens only, not at the prompt or the padding before it."""
    from transformers import LogitsProcessorList, StoppingCriteriaList

    if config.stop:
        arguments["stopping_criteria"] = StoppingCriteriaList(
            [StopStringCriterion(backbone.decode, config.stop, start)]
        )
    if config.repetition_penalty != 1:

        def penalize(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            seen = torch.zeros_like(scores, dtype=torch.bool)
            for number, row in enumerate(input_ids[:, start:].tolist()):
                # An encoder-decoder repeats nothing when it takes up its source.
                given = prompts[number // config.num_beams] if backbone.kind == "decoder" else ()
                seen[number, [*given, *row]] = True
            penalty = config.repetition_penalty
            return torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)

        arguments["logits_processor"] = LogitsProcessorList([penalize])


def _transformers_config(backbone: Backbone, config: GenerateConfig) -> Any:
    from transformers import GenerationConfig

    values: dict[str, Any] = {
        "max_new_tokens": config.max_new_tokens,
        "num_beams": config.num_beams,
        "do_sample": config.temperature > 0,
        "pad_token_id": backbone.pad_id,
        "eos_token_id": backbone.eos_id,
        "use_cache": True,
    }
    if backbone.kind == "encoder-decoder":
        values["decoder_start_token_id"] = backbone.decoder_start_id
        if backbone.forced_bos_id is not None:
            values["forced_bos_token_id"] = backbone.forced_bos_id
    if config.cache == "static" and backbone.layout.cache_layers is None:
        values["cache_implementation"] = "static"
    if config.compile:
        from transformers import CompileConfig

        values["compile_config"] = CompileConfig(fullgraph=False)
        # By default transformers compiles on accelerators alone.
        values["compile_config"]._compile_all_devices = True
    else:
        values["disable_compile"] = True
    if config.prompt_lookup:
        values["prompt_lookup_num_tokens"] = config.prompt_lookup
    if config.min_new_tokens:
        values["min_new_tokens"] = config.min_new_tokens
    if config.num_beams > 1:
        values["length_penalty"] = config.length_penalty
    if config.temperature > 0:
        values |= {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    if config.ban_newlines:
        values["suppress_tokens"] = newline_tokens(backbone)
    return GenerationConfig(**values)


def newline_tokens(backbone: Backbone) -> list[int]:
    """Every token whose text holds a line break."""
    found: list[int] | None = backbone.tokenizer_cache.get("newline_tokens")
    if found is None:
        size = int(backbone.model.get_output_embeddings().weight.shape[0])
        texts = backbone.tokenizer.batch_decode([[number] for number in range(min(size, len(backbone.tokenizer)))])
        found = [number for number, text in enumerate(texts) if "\n" in text or "\r" in text]
        backbone.tokenizer_cache["newline_tokens"] = found
    return found


class sampling_seed:
    """Draw from a given seed, and leave torch's own random state as it was."""

    def __init__(self, seed: int | None, device: torch.device) -> None:
        self.seed, self.devices = seed, [device] if device.type == "cuda" else []

    def __enter__(self) -> None:
        self.fork = torch.random.fork_rng(devices=self.devices, enabled=self.seed is not None)
        self.fork.__enter__()
        if self.seed is not None:
            torch.manual_seed(self.seed)

    def __exit__(self, *details: Any) -> None:
        self.fork.__exit__(*details)
