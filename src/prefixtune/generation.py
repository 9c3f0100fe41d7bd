"""Generate with prefixes: greedy, sampling, beams, streaming; every text with its own prefix, mixed in one batch.

transformers generates; this module hands it a cache that already holds the prefixes, or, where a model keeps no such
cache (encoder-decoders, latent attention, hybrids), puts them in front of every attention. Beams, processors and
stopping are transformers' own. Knows nothing of tasks, files or training.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from prefixtune import attach
from prefixtune.attach import check_fits
from prefixtune.backbone import Backbone, BackboneLike, as_backbone
from prefixtune.batching import (
    TextFormatLike,
    as_text_format,
    check_texts,
    encode_prompts,
    fit_prompt,
    format_of,
    report_cut,
)
from prefixtune.checkpoint import PrefixLike, as_prefix
from prefixtune.config import as_config, check_names, fit_types
from prefixtune.errors import ConfigError, RequestError, describe_value
from prefixtune.prefix import Prefix
from prefixtune.text_format import POLICIES, TextFormat

__all__ = [
    "GenerateConfig",
    "Prompts",
    "check_tagging_lengths",
    "generate",
    "generate_ids",
    "prepare_prompts",
    "stream",
]

_HINT = "`prefixtune generate --help` explains the options."
_STOPPING = "`stop` takes strings that end an output; the end token always does."
_NARROWING = "top_k and top_p narrow what is sampled from."
_ELSEWHERE = {
    "do_sample": "set temperature above 0 to sample; 0 (the default) is greedy.",
    "max_length": "max_new_tokens counts what is generated; max_total_length says when a source is too long.",
    "max_tokens": "it is called max_new_tokens here.",
    "min_length": "min_new_tokens counts what is generated, without the text before it.",
    "num_return_sequences": "give a text several times, as in [text] * 3, with a temperature above 0.",
    "n": "give a text several times, as in [text] * 3, with a temperature above 0.",
    "early_stopping": "beam search ends when its beams do; length_penalty favours longer or shorter outputs.",
    "no_repeat_ngram_size": "repetition_penalty above 1 discourages repeating.",
    **dict.fromkeys(("frequency_penalty", "presence_penalty"), "repetition_penalty above 1 discourages repeating."),
    **dict.fromkeys(("stop_strings", "eos_token_id", "stopping_criteria"), _STOPPING),
    **dict.fromkeys(("typical_p", "min_p", "epsilon_cutoff", "eta_cutoff"), _NARROWING),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens"), "ban_newlines=True bans line breaks."),
    "cache_implementation": "cache is 'dynamic' or 'static'.",
    "prompt_lookup_num_tokens": "it is called prompt_lookup here.",
    "assistant_model": "give assistant=load_backbone(...).",
    "streamer": "`prefixtune.generation.stream` yields pieces as they come.",
    "generation_config": "give config=GenerateConfig(...), or the options themselves.",
    **dict.fromkeys(("pad_token_id", "use_cache", "tokenizer"), "leave it out: it comes from the backbone."),
}
"""Names of transformers (and of OpenAI's interface) for decoding, and what to write here instead."""


@dataclass(frozen=True)
class GenerateConfig:
    """How to decode.

    Attributes:
        max_new_tokens: Most tokens to generate.
        min_new_tokens: Fewest tokens before the end token may come.
        num_beams: Beams; 1: no beam search.
        length_penalty: Of beam search; above 0 favours longer outputs.
        temperature: 0: greedy; above: sample.
        top_k: Sample from the k likeliest; 0: all.
        top_p: Sample from the likeliest that together reach p.
        seed: Of sampling; None: not reproducible.
        stop: One string or several that end an output, and are left out of it; kept as a tuple.
        ban_newlines: Never generate a token that holds a line break.
        repetition_penalty: Above 1 discourages repeating.
        batch_size: Texts per batch.
        cache: `dynamic` grows with the text; `static` is one buffer, written in place.
        compile: Compile the decoding step with torch.compile; needs the static cache.
        prompt_lookup: Guess up to this many tokens from what the text already holds, and check them in one pass; 0: no
            guessing. Texts go one at a time.
        max_total_length: Positions of source and target together (of each, for an encoder-decoder); 0: as in training.
        on_too_long: `cut` a source that is too long, or raise an `error`; empty: as in training.

    Raises:
        ConfigError: Values that are not allowed; all faults at once.
    """

    max_new_tokens: int = 100
    min_new_tokens: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    ban_newlines: bool = False
    repetition_penalty: float = 1.0
    batch_size: int = 16
    cache: str = "dynamic"
    compile: bool = False
    prompt_lookup: int = 0
    max_total_length: int = 0
    on_too_long: str = ""

    def __new__(cls, *_: Any, **values: Any) -> GenerateConfig:
        """Refuse unknown names, with the nearest known one."""
        check_names(cls, values, "there is no such generation option", _HINT, _ELSEWHERE)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if isinstance(self.stop, str | Sequence):
            object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        wrong = list(fit_types(self).values())
        if isinstance(self.stop, tuple) and not all(isinstance(s, str) for s in self.stop):
            wrong.append(f"stop is {self.stop!r}, but must be a string or several")
        if wrong:
            raise ConfigError("; ".join(wrong) + ".", hint=_HINT)
        rules = [
            (self.max_new_tokens >= 1, "max_new_tokens", "at least 1"),
            (
                0 <= self.min_new_tokens <= self.max_new_tokens,
                "min_new_tokens",
                "between 0 and max_new_tokens",
            ),
            (self.num_beams >= 1, "num_beams", "at least 1"),
            (math.isfinite(self.length_penalty), "length_penalty", "a finite number"),
            (self.temperature >= 0 and math.isfinite(self.temperature), "temperature", "0 (greedy) or above"),
            (self.top_k >= 0, "top_k", "0 (all) or above"),
            (0 < self.top_p <= 1, "top_p", "above 0 and at most 1"),
            (not any(s == "" for s in self.stop), "stop", "strings that are not empty"),
            (self.repetition_penalty > 0, "repetition_penalty", "above 0"),
            (self.batch_size >= 1, "batch_size", "at least 1"),
            (self.cache in ("dynamic", "static"), "cache", "dynamic or static"),
            (not self.compile or self.cache == "static", "compile", "False unless cache is 'static'"),
            (self.prompt_lookup >= 0, "prompt_lookup", "0 (none) or above"),
            (self.max_total_length >= 0, "max_total_length", "0 (as in training) or above"),
            (self.on_too_long in ("", *POLICIES), "on_too_long", "cut or error"),
        ]
        faults = [
            f"{name} is {getattr(self, name)!r}, but must be {allowed}" for good, name, allowed in rules if not good
        ]
        if self.min_new_tokens > self.max_new_tokens:
            faults.append(f"max_new_tokens is {self.max_new_tokens}")
        if self.num_beams > 1 and self.temperature > 0:
            faults.append("beam search and sampling exclude each other here: set temperature to 0 or num_beams to 1")
        if self.prompt_lookup and (self.num_beams > 1 or self.cache != "dynamic"):
            faults.append("prompt look-up needs num_beams = 1 and the dynamic cache")
        if faults:
            raise ConfigError("; ".join(faults) + ".", hint=_HINT)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> GenerateConfig:
        """From keys and values.

        Raises:
            ConfigError: An unknown key, with the nearest known one.
        """
        check_names(cls, values, "there is no such generation option", _HINT, _ELSEWHERE)
        return cls(**values)


def check_tagging_lengths(config: GenerateConfig) -> None:
    """Refuse options for long sources where texts are tagged: every token gets its tag.

    Raises:
        ConfigError: There is one.
    """
    if config.max_total_length or config.on_too_long == "cut":
        raise ConfigError(
            "texts to be tagged are never cut: every token gets its tag.", hint="leave max_length and on_too_long out."
        )


@dataclass(frozen=True)
class Prompts:
    """Texts as token ids, checked and cut.

    Attributes:
        ids: Of each text.
        formats: Of each text.
        new_tokens: Most tokens to generate for each.
    """

    ids: tuple[list[int], ...]
    formats: tuple[TextFormat, ...]
    new_tokens: tuple[int, ...]


def prepare_prompts(
    backbone: Backbone,
    texts: Sequence[str],
    prefixes: Sequence[Prefix | None],
    config: GenerateConfig,
    text_format: TextFormat | None = None,
    *,
    on_cut: Callable[[Sequence[int]], None] | None = None,
) -> Prompts:
    """Format, tokenize, and cut or check all texts, before any of them is computed.

    Args:
        backbone: The frozen model.
        texts: Sources, as in training.
        prefixes: One per text.
        config: How to decode, and what becomes of long sources.
        text_format: The text around a source; None: what each prefix was trained with.
        on_cut: Called with the numbers of the sources that were cut to fit, counted from 0, where any were; None: a
            warning says so.

    Raises:
        RequestError: A text does not fit, and is not to be cut.
        BackboneError: A prefix does not fit the backbone.
        CheckpointError: A prefix's header holds a text format that cannot be used.
    """
    by_prefix = {id(prefix): format_of(backbone, prefix, text_format) for prefix in prefixes}
    formats = [by_prefix[id(prefix)].with_lengths(config.max_total_length, config.on_too_long) for prefix in prefixes]
    whole = [encode_prompts(backbone, form, [text])[0] for text, form in zip(texts, formats, strict=True)]
    lengths = [0 if prefix is None else prefix.length() for prefix in prefixes]
    rows = list(zip(whole, formats, lengths, strict=True))
    new_tokens = [_new_tokens(backbone, form, prompt, length, config) for prompt, form, length in rows]
    ids = [
        fit_prompt(backbone, form, prompt, prefix_length=length, new_tokens=most, name=f"text {number}")
        for number, ((prompt, form, length), most) in enumerate(zip(rows, new_tokens, strict=True), start=1)
    ]
    _check_requests(backbone, ids, prefixes, new_tokens)
    report_cut(whole, ids, on_cut)
    return Prompts(tuple(ids), tuple(formats), tuple(new_tokens))


def _new_tokens(
    backbone: Backbone, text_format: TextFormat, prompt: Sequence[int], prefix_length: int, config: GenerateConfig
) -> int:
    """Most tokens to generate: where training left a prompt of this length whole, no more than fit behind it."""
    limit = backbone.max_positions
    if backbone.kind != "decoder" or limit is None or len(prompt) > text_format.longest_prompt:
        return config.max_new_tokens
    left = limit - backbone.taken_positions(prefix_length) - len(prompt)
    return min(left, config.max_new_tokens) if left > 0 else config.max_new_tokens


def generate(
    backbone: BackboneLike,
    texts: Sequence[str],
    prefix: PrefixLike | Sequence[PrefixLike | None] | None = None,
    *,
    text_format: TextFormatLike | None = None,
    config: GenerateConfig | Mapping[str, Any] | None = None,
    assistant: BackboneLike | None = None,
    on_batch: Callable[[int], None] | None = None,
    on_cut: Callable[[Sequence[int]], None] | None = None,
    **options: Any,
) -> list[str]:
    """Continue texts, each with its own prefix.

    Args:
        backbone: The frozen model: a `Backbone`, a name or path (loaded for this call), or a (model, tokenizer) pair.
        texts: Sources, as in training (linearized, without separators).
        prefix: One for all texts, one per text, or None; within a list, None leaves that text to the bare model. A
            prefix is a `Prefix`, a path, or a repository of the hub.
        text_format: The text around a source: a `TextFormat`, or a dict of its fields; None: what each prefix was
            trained with, by its header.
        config: How to decode: a `GenerateConfig`, or a dict of its fields.
        assistant: A smaller model with the same tokenizer that guesses tokens for the backbone to check; the output is
            the same. Texts go one at a time.
        on_batch: Told after each batch how many texts are done.
        on_cut: Called before the work with the numbers of the sources that were cut to fit, counted from 0, where any
            were; None: a warning says so.
        **options: Fields of `GenerateConfig`, in place of `config`.

    Returns:
        One output per text, in order, stripped of outer space.

    Raises:
        RequestError: A text with its prefix does not fit the backbone's positions (before any work is done), or the
            counts differ.
        BackboneError: A prefix does not fit the backbone.
        CheckpointError: A prefix cannot be read.
        ConfigError: A wrong option, or an argument of a wrong type.
    """
    chosen = as_config(GenerateConfig, config, options)
    check_texts(texts)
    backbone = as_backbone(backbone)
    assistant = None if assistant is None else as_backbone(assistant)
    prefixes = _per_text(prefix, len(texts), backbone)
    prompts = prepare_prompts(backbone, texts, prefixes, chosen, as_text_format(text_format), on_cut=on_cut)
    outputs = generate_ids(
        backbone,
        prompts.ids,
        prefixes,
        config=chosen,
        new_tokens=prompts.new_tokens,
        assistant=assistant,
        on_batch=on_batch,
    )
    return [_read_output(backbone, ids, form, chosen) for ids, form in zip(outputs, prompts.formats, strict=True)]


def _read_output(backbone: Backbone, ids: list[int], text_format: TextFormat, config: GenerateConfig) -> str:
    """The target within generated tokens."""
    return text_format.extract_target(_cut_at_stop(backbone.decode(ids), config.stop))


def stream(
    backbone: BackboneLike,
    text: str,
    prefix: PrefixLike | None = None,
    *,
    text_format: TextFormatLike | None = None,
    config: GenerateConfig | Mapping[str, Any] | None = None,
    on_cut: Callable[[Sequence[int]], None] | None = None,
    **options: Any,
) -> Iterator[str]:
    """Continue one text, yielding pieces as they are decided; the pieces joined equal `generate`'s output.

    Arguments as for `generate`; beam search cannot stream.

    Raises:
        ConfigError: Beam search was asked for.
    """
    chosen = as_config(GenerateConfig, config, options)
    check_streams(chosen)
    if not isinstance(text, str):
        raise RequestError(f"text is {describe_value(text)}, but must be one string.", hint="stream one at a time.")
    backbone = as_backbone(backbone)
    prefix = as_prefix(prefix, backbone)
    prompts = prepare_prompts(backbone, [text], [prefix], chosen, as_text_format(text_format), on_cut=on_cut)
    form, prompt = prompts.formats[0], prompts.ids[0]
    shared: dict[str, Any] = {"config": chosen, "new_tokens": prompts.new_tokens}
    if any(form.target_words):
        # Words around the target can be taken off the whole output only.
        (ids,) = generate_ids(backbone, [prompt], [prefix], **shared)
        yield _read_output(backbone, ids, form, chosen)
        return
    streamer = _Streamer(backbone, chosen.stop)

    def work() -> None:
        try:
            generate_ids(backbone, [prompt], [prefix], streamer=streamer, **shared)
        except BaseException as error:
            streamer.fail(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        streamer.cancelled = True
        thread.join()


def check_streams(config: GenerateConfig) -> None:
    """Refuse a way of decoding that cannot stream.

    Raises:
        ConfigError: Beam search was asked for.
    """
    if config.num_beams > 1:
        raise ConfigError(
            "beam search cannot stream: its best beam is known at the end only.",
            hint="set num_beams to 1 (--num-beams 1).",
        )


def generate_ids(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    prefixes: Sequence[Prefix | None],
    *,
    config: GenerateConfig,
    new_tokens: Sequence[int] | None = None,
    assistant: Backbone | None = None,
    streamer: Any = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """`generate` on token ids: what follows each prompt, without the end token and padding.

    Texts of like length share a batch; the order of the results is that of the prompts. `new_tokens` are the most of
    each prompt, where not all have `config.max_new_tokens`.
    """
    most = [config.max_new_tokens] * len(prompts) if new_tokens is None else new_tokens
    _check_requests(backbone, prompts, prefixes, most)
    _check_guessing(backbone, config, assistant)
    size = 1 if config.prompt_lookup or assistant is not None else config.batch_size
    infix = [prefix is not None and prefix.placement == "infix" for prefix in prefixes]
    # Rows of a batch are alike in these.
    kinds = list(zip(infix, most, strict=True))
    order = sorted(range(len(prompts)), key=lambda n: (infix[n], -most[n], len(prompts[n])))
    results: list[list[int]] = [[] for _ in prompts]
    done = 0
    with _sampling_seed(config.seed, backbone.device):
        while done < len(order):
            rows = order[done : done + size]
            rows = [n for n in rows if kinds[n] == kinds[rows[0]]]
            limit = most[rows[0]]
            chosen = replace(config, max_new_tokens=limit, min_new_tokens=min(config.min_new_tokens, limit))
            outputs = _generate_batch(
                backbone, [prompts[n] for n in rows], [prefixes[n] for n in rows], chosen, assistant, streamer
            )
            for number, ids in zip(rows, outputs, strict=True):
                results[number] = ids
            done += len(rows)
            if on_batch is not None:
                on_batch(done)
    return results


@torch.inference_mode()
def _generate_batch(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    prefixes: Sequence[Prefix | None],
    config: GenerateConfig,
    assistant: Backbone | None,
    streamer: Any,
) -> list[list[int]]:
    arguments = _inputs(backbone, prompts)
    guessing = assistant is not None or config.prompt_lookup > 0
    if any(prefix is not None and prefix.placement == "infix" for prefix in prefixes):
        ours = attach.visible_slots(_prefill_infix(arguments, backbone, prefixes, config, guessing))
    # Guessed tokens come from the ids, among which a prefilled cache's slots would stand.
    elif backbone.layout.cache_layers is not None and not guessing:
        ours = attach.visible_slots(_prefill(arguments, backbone, prefixes, config))
    else:
        ours = attach.injecting(_inject(arguments, backbone, prefixes, config))
    start = 1 if backbone.kind == "encoder-decoder" else arguments["input_ids"].shape[1]
    if streamer is not None:
        arguments["streamer"] = streamer
    if assistant is not None:
        arguments["assistant_model"] = assistant.model
    _own_rules(arguments, backbone, prompts, config, start)
    with ours, backbone.computing(), _compiler_errors():
        output = backbone.model.generate(**arguments, generation_config=_transformers_config(backbone, config))
    new = output[:, start:].tolist()
    rows = [row[: row.index(backbone.end_id)] if backbone.end_id in row else row for row in new]
    return [_stopped(backbone, row, config.stop) for row in rows]


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
    cache, slots = attach.prefilled_cache(
        backbone.model, backbone.layout, prefixes, repeats=config.num_beams, static_length=room
    )
    if width:
        # The prefix's slots are already in the cache; transformers wants to see them in ids and mask all the same.
        front = torch.full((rows, width), backbone.pad_id, device=backbone.device)
        arguments["input_ids"] = torch.cat([front, arguments["input_ids"]], dim=1)
        arguments["attention_mask"] = torch.cat([slots.long(), arguments["attention_mask"]], dim=1)
    if width or room is not None:
        arguments[attach.cache_argument(backbone.model)] = cache
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
    cache = attach.growing_cache(backbone.model)
    if ids.shape[1] > 1:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        name = attach.cache_argument(backbone.model)
        backbone.model(
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=positions[:, :-1],
            use_cache=True,
            **{name: cache},
        )
    width = _prefill(arguments, backbone, prefixes, config)
    filled = arguments[attach.cache_argument(backbone.model)]
    if ids.shape[1] > 1:
        for number in backbone.layout.cache_layers or ():
            layer = cache.layers[number]
            repeated = (part.repeat_interleave(config.num_beams, dim=0) for part in (layer.keys, layer.values))
            filled.update(*repeated, number)
    return width


def _inject(
    arguments: dict[str, Any], backbone: Backbone, prefixes: Sequence[Prefix | None], config: GenerateConfig
) -> attach.Injection:
    """What puts the prefixes in front of every attention, with positions and cache to match."""
    made = attach.stack(prefixes, backbone.geometry, backbone.dtype, backbone.device)
    if backbone.kind == "decoder":
        shift = torch.tensor([0 if p is None else p.length() for p in prefixes], device=backbone.device)
        counted = (arguments["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        arguments["position_ids"] = counted + shift[:, None]
        if backbone.layout.cache_layers is not None:
            arguments[attach.cache_argument(backbone.model)] = attach.growing_cache(backbone.model)
    elif config.cache == "dynamic":
        from transformers import DynamicCache, EncoderDecoderCache

        # transformers' own is as deep as the encoder, which fails where the decoder is deeper.
        arguments[attach.cache_argument(backbone.model)] = EncoderDecoderCache(DynamicCache(), DynamicCache())
    return attach.Injection(backbone.layout.places, made.layers, made.visible)


def _stopped(backbone: Backbone, ids: list[int], stop: Sequence[str]) -> list[int]:
    """The ids up to the end of the first stop string; what follows is padding."""
    if stop and _holds(backbone, ids, stop):
        return ids[: next(n for n in range(1, len(ids) + 1) if _holds(backbone, ids[:n], stop))]
    return ids


def _holds(backbone: Backbone, ids: list[int], stop: Sequence[str]) -> bool:
    text = backbone.decode(ids)
    return any(s in text for s in stop)


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

        def stop(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            done = [_holds(backbone, row, config.stop) for row in input_ids[:, start:].tolist()]
            return torch.tensor(done, device=input_ids.device)

        arguments["stopping_criteria"] = StoppingCriteriaList([stop])
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
        "eos_token_id": backbone.end_id,
        "use_cache": True,
    }
    if backbone.kind == "encoder-decoder":
        values["decoder_start_token_id"] = backbone.start_id
        if backbone.first_id is not None:
            values["forced_bos_token_id"] = backbone.first_id
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
    found: list[int] | None = backbone.memo.get("newline_tokens")
    if found is None:
        size = int(backbone.model.get_output_embeddings().weight.shape[0])
        texts = backbone.tokenizer.batch_decode([[number] for number in range(min(size, len(backbone.tokenizer)))])
        found = [number for number, text in enumerate(texts) if "\n" in text or "\r" in text]
        backbone.memo["newline_tokens"] = found
    return found


def _per_text(
    prefix: PrefixLike | Sequence[PrefixLike | None] | None, count: int, backbone: Backbone
) -> list[Prefix | None]:
    """One prefix per text; each is read once."""
    if isinstance(prefix, str) or not isinstance(prefix, Sequence):
        return [as_prefix(prefix, backbone)] * count
    if len(prefix) != count:
        raise RequestError(
            f"{len(prefix)} prefixes for {count} texts.", hint="give one for all, or one (or None) per text."
        )
    read = {str(one): as_prefix(one, backbone) for one in prefix if isinstance(one, str | os.PathLike)}
    return [read[str(one)] if isinstance(one, str | os.PathLike) else as_prefix(one, backbone) for one in prefix]


def _check_requests(
    backbone: Backbone, prompts: Sequence[Sequence[int]], prefixes: Sequence[Prefix | None], new_tokens: Sequence[int]
) -> None:
    """Refuse what cannot work before any of it is done."""
    for given in {id(p): p for p in prefixes if p is not None}.values():
        check_fits(given, backbone.geometry, backbone.name)
    if backbone.kind == "encoder":
        raise RequestError(
            f"{backbone.name!r} is an encoder, which reads text and writes none.",
            hint="use it for classification or tagging, or choose a model that generates.",
        )
    limit = backbone.max_positions
    apart = backbone.kind == "encoder-decoder"
    for number, (prompt, prefix, most) in enumerate(zip(prompts, prefixes, new_tokens, strict=True)):
        if not prompt:
            raise RequestError(f"text {number + 1} has no token.", hint="use a prompt format with a separator.")
        taken = backbone.taken_positions(0 if prefix is None else prefix.length())
        needed = max(len(prompt), most + 1) if apart else taken + len(prompt) + most
        if limit is not None and needed > limit:
            both = f"{len(prompt)} (text) and {most} (new)"
            raise RequestError(
                f"text {number + 1} needs {both if apart else f'{taken} (prefix) + {both}'.replace(' and ', ' + ')} "
                f"positions, but {backbone.name!r} has {limit}{' on either side' if apart else ''}.",
                hint="shorten the text or lower max_new_tokens.",
            )


def _check_guessing(backbone: Backbone, config: GenerateConfig, assistant: Backbone | None) -> None:
    """Refuse guessing ahead where it cannot work."""
    if assistant is not None:
        if config.num_beams > 1 or config.cache != "dynamic" or config.prompt_lookup:
            raise ConfigError(
                "an assistant needs num_beams = 1, the dynamic cache and no prompt look-up.", hint="leave those out."
            )
        if assistant.kind != backbone.kind or len(assistant.tokenizer) != len(backbone.tokenizer):
            raise ConfigError(
                f"{assistant.name!r} cannot assist {backbone.name!r}: its kind or its vocabulary differs.",
                hint="choose a smaller model of the same family.",
            )
        if assistant.kind == "encoder-decoder" and not attach.cuts_empty_layers():
            told = getattr(assistant.model.config.get_text_config(decoder=True), "num_hidden_layers", 0)
            if told > len(assistant.geometry.get("decoder", ())):
                raise ConfigError(
                    f"this transformers cannot guess with {assistant.name!r}, whose decoder has fewer layers than its "
                    "encoder.",
                    hint="upgrade transformers to 5.24, or leave the assistant out.",
                )
    if config.compile and backbone.layout.cache_layers is None:
        raise ConfigError(
            f"decoding with {backbone.name!r} puts the prefix into every step, which is not compiled.",
            hint="leave compile out; the static cache works.",
        )
    depth = getattr(backbone.model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    decoder = len(backbone.geometry.get("decoder", ()))
    if config.cache == "static" and backbone.kind == "encoder-decoder" and depth is not None and depth < decoder:
        raise ConfigError(
            f"a static cache has {depth} layers here, but the decoder of {backbone.name!r} has {decoder}.",
            hint="use the dynamic cache.",
        )
    mixing = backbone.kind == "decoder" and not backbone.layout.packable
    if mixing and (config.cache == "static" or config.prompt_lookup or assistant is not None):
        raise ConfigError(
            f"{backbone.name!r} keeps more than keys and values: its cache cannot be cut back or laid out beforehand.",
            hint="use the dynamic cache, without guessing ahead.",
        )


def _cut_at_stop(text: str, stop: Sequence[str]) -> str:
    places = [place for place in (text.find(s) for s in stop) if place >= 0]
    return text[: min(places)] if places else text


class _sampling_seed:
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


class _Cancelled(Exception):
    """The reader of a stream went away."""


class _Streamer:
    """Takes tokens from transformers' loop and gives text that can no longer change.

    Held back: a piece that may be part of a character still, of a stop string, or of the stripped space around.
    """

    def __init__(self, backbone: Backbone, stop: Sequence[str]) -> None:
        self.backbone, self.stop = backbone, stop
        self.ids: list[int] = []
        self.given = 0
        self.cancelled = False
        self.pieces: queue.Queue[str | BaseException | None] = queue.Queue()
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self.cancelled:
            raise _Cancelled
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.ids.extend(value.reshape(-1).tolist())
        text = self._text().rstrip()
        if text.endswith("\ufffd"):
            return
        held = max((n for s in self.stop for n in range(len(s)) if n and text.endswith(s[:n])), default=0)
        self._give(text[: len(text) - held].rstrip())

    def end(self) -> None:
        self._give(self._text().rstrip())
        self.pieces.put(None)

    def fail(self, error: BaseException) -> None:
        self.pieces.put(None if isinstance(error, _Cancelled) else error)

    def _text(self) -> str:
        ids = self.ids[: self.ids.index(self.backbone.end_id)] if self.backbone.end_id in self.ids else self.ids
        return _cut_at_stop(self.backbone.decode(ids), self.stop).lstrip()

    def _give(self, text: str) -> None:
        if len(text) > self.given:
            self.pieces.put(text[self.given :])
            self.given = len(text)

    def __iter__(self) -> Iterator[str]:
        while (piece := self.pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
