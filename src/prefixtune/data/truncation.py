"""How many positions a text has, and what becomes of one that is too long: in training, in use and in every server.

Two steps. `bounded` lets a tokenizer read no more than could matter; whoever makes token ids of texts
(`encode_prompts` and `encode_chat`, with `positions`) calls it. `prefix.text_format.cut_prompt` then cuts the ids or
refuses them: by way of `fit_source` beside the targets of an example, of `truncate_prompt` where tokens are generated.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence

from prefixtune.backbone.backbone import Backbone
from prefixtune.data.chat import Source, lengths_around
from prefixtune.data.examples import Example
from prefixtune.errors import DataError, PrefixWarning, RequestError, short_repr
from prefixtune.prefix.text_format import TextFormat, TruncationPolicy, cut_prompt


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
        what = f"a prefix of {prefix_length} leaves no room in the {allowed} positions of {backbone.name!r}."
        raise DataError(what, hint="choose a shorter prefix_length.")
    return min(max_length or allowed, allowed - taken)


def template_lengths(backbone: Backbone, text_format: TextFormat, source: Source = "") -> tuple[int, int]:
    """Tokens before and after a prompt's source, which a cut leaves: those of the template, and special tokens.

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
    special, ids = set(backbone.tokenizer.all_special_ids), backbone.encode_sources(["a"])[0]
    own = [index for index, token in enumerate(ids) if token not in special]
    return (before + own[0], after + len(ids) - 1 - own[-1]) if own else (before, after)


def fit_source(
    backbone: Backbone,
    text_format: TextFormat,
    prompt: Sequence[int],
    targets: Iterable[Sequence[int]],
    limit: int,
    on_too_long: TruncationPolicy = "cut",
    source: Source = "",
) -> tuple[int, ...]:
    """A training example's prompt, so that each of its targets fits behind it; a source that is too long is cut.

    Args:
        backbone: An encoder-decoder reads source and target apart, each with as many positions.
        text_format: The text around a source.
        prompt: As `encode_prompts` makes it.
        targets: They are never cut.
        limit: As `position_limit` says.
        on_too_long: `cut` the source at its end, or raise an `error`.
        source: As for `template_lengths`.

    Raises:
        RequestError: It is too long and must not be cut, or a target leaves no room for any of its source.
    """
    beside = max(map(len, targets), default=0)
    if beside > limit:
        what = f"a target takes {beside} tokens, but only {limit} positions are there."
        raise RequestError(what, hint="shorten it or the prefix, or raise max_length; targets are never cut.")
    room = limit if backbone.kind == "encoder-decoder" else limit - beside
    around = functools.partial(template_lengths, backbone, text_format, source)
    return tuple(cut_prompt(prompt, room, around, on_too_long=on_too_long, name="its source", beside=beside))


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
    """A prompt's tokens; a source that is too long is treated as in training (see `prefix.text_format.cut_prompt`).

    Where the format says `error`, one that does not fit the model is returned as it is: the caller refuses it.

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
    apart, policy = backbone.kind == "encoder-decoder", text_format.on_too_long
    known = None if whole is None or policy == "error" else whole - backbone.prefix_positions(prefix_length)
    room = text_format.source_room(len(prompt), known, new_tokens, apart=apart)
    if room is None:
        return list(prompt)
    around = functools.partial(template_lengths, backbone, text_format, source)
    return cut_prompt(prompt, room, around, on_too_long=policy, name=name, beside=0 if apart else new_tokens)


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


@contextlib.contextmanager
def named_example(example: Example, number: int) -> Iterator[None]:
    """What is refused within is a fault of this example.

    Raises:
        DataError: In place of a `RequestError`; it names the example.
    """
    try:
        yield
    except RequestError as error:
        name = f"example {number} ({short_repr(example.source)})"
        raise DataError(f"{name}: {error.message}", hint=error.hint) from None
