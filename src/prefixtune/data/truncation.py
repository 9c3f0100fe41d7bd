"""Sources that are too long: how many positions they have, and how they are truncated in training and in use."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from prefixtune.backbone.backbone import Backbone
from prefixtune.data.chat import Source, lengths_around
from prefixtune.errors import DataError, PrefixWarning
from prefixtune.prefix.text_format import TextFormat, fit_ids


def position_limit(backbone: Backbone, prefix_length: int, max_length: int) -> int:
    """Positions for source and target together.

    Args:
        backbone: Its number of positions counts.
        prefix_length: P; the prefix takes some of the positions.
        max_length: The user's limit; 0: none.

    Raises:
        DataError: The prefix leaves no room.
    """
    allowed = backbone.max_positions_with(prefix_length)
    if allowed is None:
        return max_length or 1 << 30
    taken = backbone.prefix_positions(prefix_length)
    if allowed - taken < 2:
        raise DataError(
            f"a prefix of {prefix_length} leaves no room in the {allowed} positions of {backbone.name!r}.",
            hint="choose a shorter prefix_length.",
        )
    return min(max_length or allowed, allowed - taken)


def template_lengths(backbone: Backbone, text_format: TextFormat, source: Source = "") -> tuple[int, int]:
    """Tokens before and after a prompt's source: those of the format's template, and special tokens.

    Truncation keeps them, and is refused if it would keep nothing else.

    Args:
        backbone: Its tokenizer counts.
        text_format: The text around a source.
        source: With a chat template: the conversation, of which the last message is cut.
    """
    if text_format.is_chat:
        return lengths_around(backbone, text_format, source)
    before, after = (len(backbone.encode(text)) for text in text_format.around(backbone.separator))
    if backbone.kind == "decoder":
        return before, after
    special = set(backbone.tokenizer.all_special_ids)
    ids = backbone.encode_sources(["a"])[0]

    def leading_special(row: Sequence[int]) -> int:
        return next((count for count, token in enumerate(row) if token not in special), 0)

    return before + leading_special(ids), after + leading_special(ids[::-1])


def truncate_prompt(
    backbone: Backbone,
    text_format: TextFormat,
    prompt: Sequence[int],
    *,
    prefix_length: int,
    new_tokens: int,
    positions: int | None = None,
    name: str = "the text",
    source: Source = "",
) -> list[int]:
    """A prompt's tokens; a source that is too long is treated as in training.

    If the text format says `error`, a prompt that does not fit the backbone is returned as it is: the caller that
    computes it refuses it.

    Args:
        backbone: Its tokenizer and positions count.
        text_format: Says what happens to long sources, and how long they may be.
        prompt: As `encode_prompts` makes it.
        prefix_length: P; the prefix takes as many of a decoder-only backbone's positions.
        new_tokens: Most tokens to generate.
        positions: Of the whole sequence, the prefix included; None: the backbone's.
        name: What messages call the text.
        source: What the prompt was made of; needed where it is a conversation.

    Raises:
        RequestError: It is longer than the training allowed and may not be truncated, or nothing of its source would be
            left.
    """
    whole = backbone.max_positions_with(prefix_length) if positions is None else positions
    return fit_ids(
        text_format,
        prompt,
        positions=None if whole is None else whole - backbone.prefix_positions(prefix_length),
        new_tokens=new_tokens,
        around=lambda: template_lengths(backbone, text_format, source),
        apart=backbone.kind == "encoder-decoder",
        name=name,
    )


def report_truncated(
    whole: Sequence[Sequence[int]], truncated: Sequence[Sequence[int]], on_cut: Callable[[Sequence[int]], None] | None
) -> None:
    """Report which prompts were truncated, by their indices; without `on_cut`, warn."""
    pairs = zip(whole, truncated, strict=True)
    indices = [index for index, (before, after) in enumerate(pairs) if len(after) < len(before)]
    if indices and on_cut is not None:
        on_cut(indices)
    elif indices:
        # The warning names the line that called `generate` or `classify`.
        warnings.warn(
            f"{len(indices)} of {len(whole)} sources were truncated to fit (on_too_long is 'cut').",
            PrefixWarning,
            stacklevel=4,
        )
