"""Encoding."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.data import Example
from prefixtune.errors import ConfigError, DataError, RequestError, describe_value
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat, cut_prompt, fit_ids, read_text_format
from prefixtune.utils.options import check_names, type_fault

__all__ = [
    "TextFormatLike",
    "TokenizedDataset",
    "TokenizedExample",
    "around_lengths",
    "as_text_format",
    "check_texts",
    "default_format",
    "encode_examples",
    "encode_prompts",
    "fit_prompt",
    "format_of",
    "position_limit",
    "report_cut",
]


@dataclass(frozen=True)
class TokenizedExample:
    """One source and its targets as token ids; a target's ids end with the end token.

    Where a head is trained, there is one target, of label numbers.

    Attributes:
        prompt: The source's tokens.
        targets: Each target's tokens; or the label numbers.
        label_positions: Where in the prompt each label is predicted; None: the targets are tokens.
    """

    prompt: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]
    label_positions: tuple[int, ...] | None = None


@dataclass(frozen=True)
class TokenizedDataset:
    """Encoded examples, how many sources had to be cut to fit, and the tokens of the longest prompt that was not."""

    examples: tuple[TokenizedExample, ...]
    num_cut: int
    longest_prompt: int = 0

    @property
    def num_targets(self) -> int:
        """Targets over all examples."""
        return sum(len(example.targets) for example in self.examples)

    @property
    def longest_target(self) -> int:
        """Tokens of the longest target; 0 where labels are predicted."""
        rows = (example.targets for example in self.examples if example.label_positions is None)
        return max((len(target) for targets in rows for target in targets), default=0)


def default_format(backbone: Backbone, *, for_head: bool = False) -> TextFormat:
    """The text around source and target that suits a kind of model.

    A decoder-only model reads both in one text, with a separator between (the authors' format); an encoder reads the
    source as it is, within the tokenizer's own special tokens. For a head a decoder-only model reads the source alone:
    what it holds at a separator says little of the text before.
    """
    if for_head and backbone.kind == "decoder":
        return TextFormat(" {source}", "{target}")
    return TextFormat() if backbone.kind == "decoder" else TextFormat("{source}", "{target}")


def check_texts(texts: Sequence[str]) -> None:
    """Refuse what is no list of strings.

    Raises:
        RequestError: It is none.
    """
    if isinstance(texts, str):
        raise RequestError(f"texts is one string, {texts[:40]!r}, not a list of them.", hint="write [text].")
    if isinstance(texts, Mapping) or not (hasattr(texts, "__len__") and hasattr(texts, "__iter__")):
        raise RequestError(f"texts is {describe_value(texts)}, not a list of strings.", hint="write [text].")
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise RequestError(f"text {number} is {describe_value(text)}, not a string.", hint="write a list of texts.")


TextFormatLike = TextFormat | Mapping[str, Any]
"""What stands for a text format: itself, or a dict of its fields."""


def as_text_format(given: TextFormatLike | None) -> TextFormat | None:
    """The text format that a caller means; None: none was given.

    >>> as_text_format({"prompt": "{source} ="}).prompt
    '{source} ='

    Raises:
        ConfigError: It is neither a `TextFormat` nor a dict of its fields.
        DataError: A template lacks its text.
    """
    hint = 'write {"prompt": "{source} =", "target": " {target}"}, say.'
    if given is None or isinstance(given, TextFormat):
        return given
    if not isinstance(given, Mapping):
        raise ConfigError(f"text_format is {describe_value(given)}, but must be a TextFormat or a dict.", hint=hint)
    check_names(TextFormat, given, "text_format has unknown keys", hint)
    for name, value in given.items():
        if fault := type_fault(f"text_format.{name}", value, type(getattr(TextFormat, name))):
            raise ConfigError(f"{fault}.", hint=hint)
    return TextFormat(**given)


def format_of(backbone: Backbone, prefix: Prefix | None, given: TextFormat | None = None) -> TextFormat:
    """The text format of a request: as asked for, else the prefix's, else what suits the backbone.

    Raises:
        CheckpointError: That in the prefix's header cannot be used.
    """
    stored = None if prefix is None or given is not None else read_text_format(prefix.header)
    return given or stored or default_format(backbone)


def encode_prompts(backbone: Backbone, text_format: TextFormat, sources: Sequence[str]) -> list[list[int]]:
    """Token ids of what stands before the targets, or of what an encoder reads."""
    return backbone.encode_sources([text_format.format_prompt(source, backbone.separator) for source in sources])


def encode_examples(
    backbone: Backbone,
    examples: Sequence[Example],
    text_format: TextFormat,
    *,
    prefix_length: int,
    max_length: int = 0,
    on_too_long: str = "cut",
) -> TokenizedDataset:
    """Turn examples into token ids, cutting sources that do not fit; targets are never cut.

    Args:
        backbone: Whose tokenizer and positions count.
        examples: With at least one target each.
        text_format: The text around source and target.
        prefix_length: P; the prefix takes as many of the backbone's positions.
        max_length: Positions of source and target together (of each, for an encoder-decoder); 0: what the backbone
            allows.
        on_too_long: `cut` the source from its end, or raise an `error`.

    Raises:
        DataError: No example, one without a target, a target longer than the limit, or a too long example where
            cutting is not wanted.
    """
    if not examples:
        raise DataError("there is no example to train on.", hint="check the file and `limit`.")
    for number, example in enumerate(examples):
        if not example.targets:
            raise DataError(
                f"example {number + 1} ({example.source[:60]!r}) has no target.", hint="name the target column."
            )
    limit = position_limit(backbone, prefix_length, max_length)
    prompts = encode_prompts(backbone, text_format, [example.source for example in examples])
    flat = backbone.encode_targets([text_format.format_target(t) for example in examples for t in example.targets])
    before, after = around_lengths(backbone, text_format)
    apart = backbone.kind == "encoder-decoder"
    encoded, cut, place, longest_prompt = [], 0, 0, 0
    for number, (example, prompt) in enumerate(zip(examples, prompts, strict=True)):
        targets = tuple(tuple(ids) for ids in flat[place : place + len(example.targets)])
        place += len(targets)
        longest = max(len(target) for target in targets)
        room = limit if apart else limit - longest
        if longest > limit or (len(prompt) > room and room <= before + after):
            raise DataError(
                f"a target of example {number + 1} ({example.source[:60]!r}) takes {longest} tokens, but only {limit} "
                f"positions are there for {'it' if apart else 'source and target'}, and the text around a source takes "
                f"{before + after}.",
                hint="shorten it or raise max_length; targets are never cut.",
            )
        if len(prompt) > room:
            if on_too_long == "error":
                raise DataError(
                    f"example {number + 1} ({example.source[:60]!r}) takes {len(prompt)} tokens and its longest target "
                    f"{longest}, but {limit} positions are allowed.",
                    hint="raise max_length, or let on_too_long = 'cut' shorten the source.",
                )
            cut += 1
            prompt = cut_prompt(prompt, room, after)
        else:
            longest_prompt = max(longest_prompt, len(prompt))
        encoded.append(TokenizedExample(tuple(prompt), targets))
    return TokenizedDataset(tuple(encoded), cut, longest_prompt)


def around_lengths(backbone: Backbone, text_format: TextFormat) -> tuple[int, int]:
    """Tokens before and after a prompt's source: what the format puts there, and special tokens.

    A cut leaves them, and is refused where it would leave nothing else.
    """
    before, after = (len(backbone.encode(text)) for text in text_format.around(backbone.separator))
    if backbone.kind != "decoder":
        special = set(backbone.tokenizer.all_special_ids)
        ids = backbone.encode_sources(["a"])[0]
        before, after = (
            count + next((n for n, token in enumerate(row) if token not in special), 0)
            for count, row in ((before, ids), (after, ids[::-1]))
        )
    return before, after


def fit_prompt(
    backbone: Backbone,
    text_format: TextFormat,
    prompt: Sequence[int],
    *,
    prefix_length: int,
    new_tokens: int,
    positions: int | None = None,
    name: str = "the text",
) -> list[int]:
    """A prompt's tokens, with a source that is too long treated as in training.

    One that does not fit the backbone is left as it is where its format says `error`: whoever computes it refuses it.

    Args:
        backbone: Whose tokenizer and positions count.
        text_format: Says what becomes of long sources, and how long they may be.
        prompt: As `encode_prompts` makes it.
        prefix_length: P; the prefix takes as many of a decoder-only backbone's positions.
        new_tokens: Most tokens that are to be generated.
        positions: Of the whole, the prefix included; None: the backbone's.
        name: What to call the text, in messages.

    Raises:
        RequestError: It is longer than the training allowed, and is not to be cut; or nothing of its source would stay.
    """
    whole = backbone.max_positions if positions is None else positions
    return fit_ids(
        text_format,
        prompt,
        positions=None if whole is None else whole - backbone.prefix_positions(prefix_length),
        new_tokens=new_tokens,
        around=lambda: around_lengths(backbone, text_format),
        apart=backbone.kind == "encoder-decoder",
        name=name,
    )


def report_cut(
    before: Sequence[Sequence[int]], after: Sequence[Sequence[int]], on_cut: Callable[[Sequence[int]], None] | None
) -> None:
    """Tell which prompts were cut, counted from 0; by a warning where nobody listens."""
    cut = [number for number, (whole, ids) in enumerate(zip(before, after, strict=True)) if len(ids) < len(whole)]
    if cut and on_cut is not None:
        on_cut(cut)
    elif cut:
        # To whoever called `generate` or `classify`.
        warnings.warn(f"{len(cut)} of {len(after)} sources were cut to fit (on_too_long is 'cut').", stacklevel=4)


def position_limit(backbone: Backbone, prefix_length: int, max_length: int) -> int:
    """Positions for source and target together."""
    allowed = backbone.max_positions
    if allowed is None:
        return max_length or 1 << 30
    taken = backbone.prefix_positions(prefix_length)
    if allowed - taken < 2:
        raise DataError(
            f"a prefix of {prefix_length} leaves no room in the {allowed} positions of {backbone.name!r}.",
            hint="choose a shorter prefix_length.",
        )
    return min(max_length or allowed, allowed - taken)
