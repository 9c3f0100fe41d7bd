"""Texts -> prompts: formatted, tokenized, truncated, and checked before any of them is computed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prefixtune.backbone.backbone import Backbone
from prefixtune.data.chat import Source, chat_format, has_chat_template, special_stops, stop_ids
from prefixtune.data.encoding import AS_IT_IS, encode_prompts, format_of, plain_format
from prefixtune.data.truncation import report_truncated, truncate_prompt
from prefixtune.errors import ContextLengthError, RequestError
from prefixtune.inference.config import GenerateConfig
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import MODEL_TEMPLATE, TextFormat


@dataclass(frozen=True, eq=False)
class Prompt:
    """A text as token ids, and how its output ends.

    Attributes:
        ids: Of the prompt (encoder-decoder: what the encoder reads).
        prefix: In front of them; None: the bare model.
        new_tokens: Most tokens to generate.
        ends: The tokens, besides the tokenizer's end token, at which the output ends.
        text_format: Of the text; it says where in the output the target is.
    """

    ids: list[int]
    prefix: Prefix | None
    new_tokens: int
    ends: tuple[int, ...] = ()
    text_format: TextFormat = AS_IT_IS

    @property
    def prefix_length(self) -> int:
        """P, of the decoder; 0 without a prefix."""
        return _length(self.prefix)

    def passes(self, limit: int | None) -> bool:
        """Whether the text may become longer than `limit`, where there is one."""
        return limit is not None and self.prefix_length + len(self.ids) + self.new_tokens > limit


def prepare_prompts(
    backbone: Backbone,
    texts: Sequence[Source],
    prefixes: Sequence[Prefix | None],
    config: GenerateConfig,
    text_format: TextFormat | None = None,
    *,
    on_cut: Callable[[Sequence[int]], None] | None = None,
) -> list[Prompt]:
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
        CheckpointError: A prefix's header has an invalid text format.
    """
    formats = _formats(backbone, texts, prefixes, config, text_format)
    special = special_stops(backbone, config.stop)
    whole = [
        encode_prompts(backbone, form, [text], positions=backbone.max_positions_with(_length(prefix)))[0]
        for text, form, prefix in zip(texts, formats, prefixes, strict=True)
    ]
    prompts = []
    for number, (text, prefix, form, ids) in enumerate(zip(texts, prefixes, formats, whole, strict=True), start=1):
        new_tokens = form.fitting_tokens(len(ids), _room(backbone, len(ids), prefix), config.max_new_tokens)
        kept = truncate_prompt(
            backbone,
            form,
            ids,
            prefix_length=_length(prefix),
            new_tokens=new_tokens,
            name=f"text {number}",
            source=text,
        )
        prompts.append(Prompt(kept, prefix, new_tokens, (*stop_ids(backbone, form), *special), form))
    check_requests(backbone, prompts)
    report_truncated(whole, [prompt.ids for prompt in prompts], on_cut)
    return prompts


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
    room = _room(backbone, 0, prefix)
    if room is not None and backbone.kind == "decoder":
        (form,) = _formats(backbone, [source], [prefix], config, text_format)
        length = len(encode_prompts(backbone, form, [source], positions=room)[0])
        kept = form.source_room(length, room, 1) if form.on_too_long == "cut" else None
        if kept is not None:
            length = min(length, kept if form.longest_prompt else min(kept, room - room // 2))
        room -= length
    most = config.max_new_tokens if room is None else max(1, min(config.max_new_tokens, room))
    return config.replace(max_new_tokens=most, min_new_tokens=min(config.min_new_tokens, most))


def _formats(
    backbone: Backbone,
    texts: Sequence[Source],
    prefixes: Sequence[Prefix | None],
    config: GenerateConfig,
    text_format: TextFormat | None,
) -> list[TextFormat]:
    """The text format of each text, with the configuration's treatment of long ones.

    Where none is given or stored, the model's own chat template writes a conversation, and without a prefix a text is
    continued as it is.
    """

    @functools.cache
    def format_for(prefix: Prefix | None, is_text: bool) -> TextFormat:
        form = text_format
        is_free = form is None and (prefix is None or prefix.header.get("text_format") is None)
        if is_free and backbone.kind == "decoder":
            if not is_text and has_chat_template(backbone):
                form = chat_format(backbone, MODEL_TEMPLATE)
            elif prefix is None:
                form = plain_format(backbone)
        return format_of(backbone, prefix, form).with_lengths(config.max_total_length, config.on_too_long)

    return [format_for(prefix, isinstance(text, str)) for text, prefix in zip(texts, prefixes, strict=True)]


def check_requests(backbone: Backbone, prompts: Sequence[Prompt]) -> None:
    """Refuse a generation that cannot work.

    Raises:
        RequestError: The backbone is an encoder, a prefix has a head, or a prompt is empty or does not fit.
    """
    if any(prompt.prefix is not None and prompt.prefix.head is not None for prompt in prompts):
        what = "the prefix was trained with a head for labels, and writes no text."
        raise RequestError(what, hint="use classify or tag.")
    if backbone.kind == "encoder":
        what = f"{backbone.name!r} is an encoder, which reads text and writes none."
        raise RequestError(what, hint="use it for classification or tagging, or choose a model that generates.")
    check_positions(backbone, prompts, "shorten the text or lower max_new_tokens.")


def check_positions(backbone: Backbone, prompts: Sequence[Prompt], hint: str, *, together: bool = False) -> None:
    """Refuse prompts that are empty, or need more positions than the backbone has.

    Args:
        backbone: The frozen model.
        prompts: With the tokens that are to follow each.
        hint: What to do if one is too long.
        together: They are computed together: none may lie beyond LongRoPE's limit where another one does not.

    Raises:
        RequestError: There is such a prompt.
    """
    separate = backbone.kind == "encoder-decoder"
    for number, prompt in enumerate(prompts, start=1):
        count, new = len(prompt.ids), prompt.new_tokens
        if not count:
            raise RequestError(
                f"text {number} has no token.", hint="write some text, or a prompt format with a separator."
            )
        if (last := max(prompt.ids)) >= backbone.num_embeddings:
            what = f"text {number}: there is no token {last}: the model has {backbone.num_embeddings}."
            raise RequestError(what, hint="resize the model's embeddings to its tokenizer's.")
        taken = backbone.prefix_positions(prompt.prefix_length)
        # An encoder-decoder's start token takes the position that the last token does not.
        needed = max(count, new) if separate else taken + count + new
        limit = backbone.max_positions_with(prompt.prefix_length)
        if limit is not None and needed > limit:
            wanted = f"{taken} (prefix), {count} (text) and {new} (new)"
            what = f"text {number} needs {wanted} positions, but {backbone.name!r} has {limit}."
            raise ContextLengthError(what, hint=hint)
    passing = [prompt.passes(backbone.longrope_limit) for prompt in prompts]
    if together and len(set(passing)) > 1:
        long, short = passing.index(True) + 1, passing.index(False) + 1
        what = (
            f"text {long} is longer than LongRoPE's limit, {backbone.longrope_limit} positions, and text {short} not."
        )
        raise RequestError(what, hint="send long and short texts apart.")


def newline_tokens(backbone: Backbone) -> list[int]:
    """Every token whose text has a line break."""
    tokens: list[int] | None = backbone.tokenizer_cache.get("newline_tokens")
    if tokens is None:
        size = min(backbone.vocab_size, len(backbone.tokenizer))
        texts = backbone.tokenizer.batch_decode([[token] for token in range(size)])
        tokens = [token for token, text in enumerate(texts) if "\n" in text or "\r" in text]
        backbone.tokenizer_cache["newline_tokens"] = tokens
    return tokens


def _room(backbone: Backbone, prompt_tokens: int, prefix: Prefix | None) -> int | None:
    """Most tokens that fit behind a prompt; None: any number."""
    limit = backbone.max_positions_with(_length(prefix))
    if limit is None or backbone.kind == "encoder-decoder":
        return limit
    return limit - backbone.prefix_positions(_length(prefix)) - prompt_tokens


def _length(prefix: Prefix | None) -> int:
    return 0 if prefix is None else prefix.length()
