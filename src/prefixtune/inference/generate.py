"""Generate with prefixes: greedy, sampling, beams, streaming; every text with its own prefix, mixed in one batch.

transformers generates; this module hands it a cache that already holds the prefixes, or, where a model keeps no such
cache (encoder-decoders, latent attention, hybrids), puts them in front of every attention. Beams, processors and
stopping are transformers' own. Knows nothing of tasks, files or training.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prefixtune.attention.cache import can_crop_empty_layers
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import BackboneLike, as_backbone
from prefixtune.backbone.prefixes import PrefixLike, as_prefix
from prefixtune.data.encoding import (
    TextFormatLike,
    as_text_format,
    check_texts,
    encode_prompts,
    format_of,
)
from prefixtune.data.truncation import report_truncated, truncate_prompt
from prefixtune.errors import ConfigError, RequestError
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.decoding import generate_batch, sampling_seed
from prefixtune.inference.detokenizer import text_until_stop
from prefixtune.prefix.prefix import Prefix, check_fits
from prefixtune.prefix.text_format import TextFormat
from prefixtune.utils.options import as_config

__all__ = ["Prompts", "generate", "generate_ids", "prepare_prompts", "read_output"]


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
        truncate_prompt(backbone, form, prompt, prefix_length=length, new_tokens=most, name=f"text {number}")
        for number, ((prompt, form, length), most) in enumerate(zip(rows, new_tokens, strict=True), start=1)
    ]
    _check_requests(backbone, ids, prefixes, new_tokens)
    report_truncated(whole, ids, on_cut)
    return Prompts(tuple(ids), tuple(formats), tuple(new_tokens))


def _new_tokens(
    backbone: Backbone, text_format: TextFormat, prompt: Sequence[int], prefix_length: int, config: GenerateConfig
) -> int:
    """Most tokens to generate: where training left a prompt of this length whole, no more than fit behind it."""
    limit = backbone.max_positions
    if backbone.kind != "decoder" or limit is None or len(prompt) > text_format.longest_prompt:
        return config.max_new_tokens
    left = limit - backbone.prefix_positions(prefix_length) - len(prompt)
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
    return [read_output(backbone, ids, form, chosen) for ids, form in zip(outputs, prompts.formats, strict=True)]


def read_output(backbone: Backbone, ids: list[int], text_format: TextFormat, config: GenerateConfig) -> str:
    """The target within generated tokens."""
    return text_format.extract_target(text_until_stop(backbone.decode, ids, config.stop))


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
    with sampling_seed(config.seed, backbone.device):
        while done < len(order):
            rows = order[done : done + size]
            rows = [n for n in rows if kinds[n] == kinds[rows[0]]]
            limit = most[rows[0]]
            chosen = replace(config, max_new_tokens=limit, min_new_tokens=min(config.min_new_tokens, limit))
            outputs = generate_batch(
                backbone, [prompts[n] for n in rows], [prefixes[n] for n in rows], chosen, assistant, streamer
            )
            for number, ids in zip(rows, outputs, strict=True):
                results[number] = ids
            done += len(rows)
            if on_batch is not None:
                on_batch(done)
    return results


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
        taken = backbone.prefix_positions(0 if prefix is None else prefix.length())
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
        if assistant.kind == "encoder-decoder" and not can_crop_empty_layers():
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
