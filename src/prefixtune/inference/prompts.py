"""Texts -> prompts: formatted, tokenized, truncated, and checked before any of them is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prefixtune.backbone.backbone import Backbone
from prefixtune.data.chat import Source, chat_format, end_ids, has_chat_template, special_stops
from prefixtune.data.encoding import encode_prompts, format_of
from prefixtune.data.truncation import report_truncated, truncate_prompt
from prefixtune.errors import RequestError
from prefixtune.inference.config import GenerateConfig
from prefixtune.prefix.prefix import Prefix, check_fits
from prefixtune.prefix.text_format import MODEL_TEMPLATE, TextFormat

__all__ = [
    "Prompts",
    "check_positions",
    "check_requests",
    "fit_new_tokens",
    "limit_new_tokens",
    "prepare_prompts",
    "truncate_prompts",
]


@dataclass(frozen=True)
class Prompts:
    """Texts as token ids, checked and truncated.

    Attributes:
        ids: Of each text.
        formats: Of each text.
        new_tokens: Most tokens to generate for each.
        ends: Of each text: the tokens, besides the tokenizer's end token, at which its output ends.
    """

    ids: tuple[list[int], ...]
    formats: tuple[TextFormat, ...]
    new_tokens: tuple[int, ...]
    ends: tuple[tuple[int, ...], ...]


def prepare_prompts(
    backbone: Backbone,
    texts: Sequence[Source],
    prefixes: Sequence[Prefix | None],
    config: GenerateConfig,
    text_format: TextFormat | None = None,
    *,
    on_cut: Callable[[Sequence[int]], None] | None = None,
) -> Prompts:
    """Format, tokenize, and truncate or check all texts of a generation.

    Args:
        backbone: The frozen model.
        texts: Sources, as in training; or conversations.
        prefixes: One per text.
        config: How to decode, and what happens to long sources.
        text_format: The text around a source; None: what each prefix was trained with, and nothing without a prefix.
        on_cut: Called with the indices of the truncated sources, if there are any; None: a warning says so.

    Raises:
        RequestError: A text does not fit, and may not be truncated.
        BackboneError: A prefix does not fit the backbone.
        CheckpointError: A prefix's header has an invalid text format.
    """
    formats = _formats(backbone, texts, prefixes, config, text_format)
    whole = [encode_prompts(backbone, form, [text])[0] for text, form in zip(texts, formats, strict=True)]
    new_tokens = [
        _max_new_tokens(backbone, form, prompt, prefix, config)
        for prompt, form, prefix in zip(whole, formats, prefixes, strict=True)
    ]
    ids = truncate_prompts(backbone, whole, formats, prefixes, new_tokens, texts)
    check_requests(backbone, ids, prefixes, new_tokens)
    report_truncated(whole, ids, on_cut)
    special = special_stops(backbone, config.stop)
    ends = tuple((*end_ids(backbone, form), *special) for form in formats)
    return Prompts(tuple(ids), tuple(formats), tuple(new_tokens), ends)


def fit_new_tokens(
    backbone: Backbone, source: Source, prefix: Prefix | None, config: GenerateConfig, text_format: TextFormat | None
) -> GenerateConfig:
    """The configuration with no more new tokens than fit: for an answer whose length nobody chose.

    A source that may be cut is cut as in training; where nothing is known of that, the answer gets up to half of the
    positions.

    Args:
        backbone: The frozen model.
        source: As in training; or a conversation.
        prefix: In front of it.
        config: With the most tokens that are wanted.
        text_format: As in `prepare_prompts`.

    Raises:
        PrefixError: As `prepare_prompts`, but nothing is too long.
    """
    room, length = _room(backbone, 0, prefix), 0
    if room is not None and backbone.kind == "decoder":
        (form,) = _formats(backbone, [source], [prefix], config, text_format)
        length = len(encode_prompts(backbone, form, [source])[0])
        kept = form.source_room(length, room, 1) if form.on_too_long == "cut" else None
        if kept is not None:
            length = min(length, kept if form.longest_prompt else min(kept, room - room // 2))
    return limit_new_tokens(backbone, length, prefix, config)


def limit_new_tokens(
    backbone: Backbone, prompt_tokens: int, prefix: Prefix | None, config: GenerateConfig
) -> GenerateConfig:
    """The configuration with no more new tokens than fit behind a prompt; at least one."""
    room = _room(backbone, prompt_tokens, prefix)
    most = config.max_new_tokens if room is None else max(1, min(config.max_new_tokens, room))
    return config.replace(max_new_tokens=most, min_new_tokens=min(config.min_new_tokens, most))


def _formats(
    backbone: Backbone,
    texts: Sequence[Source],
    prefixes: Sequence[Prefix | None],
    config: GenerateConfig,
    text_format: TextFormat | None,
) -> list[TextFormat]:
    """The text format of each text, with the configuration's treatment of long ones."""
    format_by_prefix = {id(prefix): _format_of(backbone, prefix, text_format) for prefix in prefixes}
    formats = [
        format_by_prefix[id(prefix)]
        if isinstance(text, str) or text_format is not None or _has_format(prefix)
        else _conversation_format(backbone, format_by_prefix[id(prefix)])
        for text, prefix in zip(texts, prefixes, strict=True)
    ]
    return [form.with_lengths(config.max_total_length, config.on_too_long) for form in formats]


def _format_of(backbone: Backbone, prefix: Prefix | None, text_format: TextFormat | None) -> TextFormat:
    """The text format of a request; without a prefix, a text is continued as it is."""
    if prefix is None and text_format is None and backbone.kind == "decoder":
        return TextFormat("{source}", "{target}")
    return format_of(backbone, prefix, text_format)


def _has_format(prefix: Prefix | None) -> bool:
    return prefix is not None and prefix.header.get("text_format") is not None


def _conversation_format(backbone: Backbone, default: TextFormat) -> TextFormat:
    """What writes a conversation where no format is stored: the backbone's own chat template, if it has one."""
    if backbone.kind != "decoder" or not has_chat_template(backbone):
        return default
    return chat_format(backbone, MODEL_TEMPLATE)


def truncate_prompts(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    formats: Sequence[TextFormat],
    prefixes: Sequence[Prefix | None],
    new_tokens: Sequence[int],
    sources: Sequence[Source] = (),
) -> list[list[int]]:
    """Every prompt with its source truncated, if it is too long and its text format allows that.

    Raises:
        RequestError: It is longer than in training and may not be truncated, or nothing of its source would be left.
    """
    return [
        truncate_prompt(
            backbone,
            form,
            prompt,
            prefix_length=_length(prefix),
            new_tokens=most,
            positions=backbone.max_positions_with(_length(prefix)),
            name=f"text {number}",
            source=sources[number - 1] if sources else "",
        )
        for number, (prompt, form, prefix, most) in enumerate(
            zip(prompts, formats, prefixes, new_tokens, strict=True), start=1
        )
    ]


def check_requests(
    backbone: Backbone, prompts: Sequence[Sequence[int]], prefixes: Sequence[Prefix | None], new_tokens: Sequence[int]
) -> None:
    """Refuse a generation that cannot work.

    Raises:
        RequestError: The backbone is an encoder, a prefix has a head, or a prompt is empty or does not fit.
        BackboneError: A prefix does not fit the backbone.
    """
    for prefix in {id(p): p for p in prefixes if p is not None}.values():
        check_fits(prefix, backbone.geometry, backbone.name)
        if prefix.head is not None:
            raise RequestError(
                "the prefix was trained with a head for labels, and writes no text.", hint="use classify or tag."
            )
    if backbone.kind == "encoder":
        raise RequestError(
            f"{backbone.name!r} is an encoder, which reads text and writes none.",
            hint="use it for classification or tagging, or choose a model that generates.",
        )
    check_positions(backbone, prompts, prefixes, new_tokens, hint="shorten the text or lower max_new_tokens.")


def check_positions(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    prefixes: Sequence[Prefix | None],
    new_tokens: Sequence[int],
    *,
    hint: str,
) -> None:
    """Refuse prompts that are empty, or need more positions than the backbone has.

    Args:
        backbone: The frozen model.
        prompts: Token ids.
        prefixes: One per prompt.
        new_tokens: Tokens after each prompt.
        hint: What to do if one is too long.

    Raises:
        RequestError: There is such a prompt.
    """
    separate = backbone.kind == "encoder-decoder"
    for number, (prompt, prefix, new) in enumerate(zip(prompts, prefixes, new_tokens, strict=True), start=1):
        if not prompt:
            raise RequestError(
                f"text {number} has no token.", hint="write some text, or use a prompt format with a separator."
            )
        prefix_positions = backbone.prefix_positions(_length(prefix))
        # An encoder-decoder's start token takes the position that the last token does not.
        needed = max(len(prompt), new) if separate else prefix_positions + len(prompt) + new
        limit = backbone.max_positions_with(_length(prefix))
        if limit is not None and needed > limit:
            of_what = " on either side" if separate else "" if limit == backbone.max_positions else " with a prefix"
            parts = [] if separate else [f"{prefix_positions} (prefix)"]
            parts += [f"{len(prompt)} (text)", *([f"{new} (new)"] if new else [])]
            raise RequestError(
                f"text {number} needs {(' and ' if separate else ' + ').join(parts)} positions, but {backbone.name!r} "
                f"has {limit}{of_what}.",
                hint=hint,
            )


def _max_new_tokens(
    backbone: Backbone, text_format: TextFormat, prompt: Sequence[int], prefix: Prefix | None, config: GenerateConfig
) -> int:
    """Most tokens to generate: no more than fit after a prompt that training did not truncate."""
    room = _room(backbone, len(prompt), prefix)
    if room is None or len(prompt) > text_format.longest_prompt:
        return config.max_new_tokens
    return min(room, config.max_new_tokens) if room > 0 else config.max_new_tokens


def _room(backbone: Backbone, prompt_tokens: int, prefix: Prefix | None) -> int | None:
    """Most tokens that fit behind a prompt; None: any number."""
    limit = backbone.max_positions_with(_length(prefix))
    if limit is None or backbone.kind == "encoder-decoder":
        return limit
    return limit - backbone.prefix_positions(_length(prefix)) - prompt_tokens


def _length(prefix: Prefix | None) -> int:
    return 0 if prefix is None else prefix.length()
