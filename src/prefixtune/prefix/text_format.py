"""The text format that a prefix was trained with, and the one function that reads it from a header.

It says how a source and a target become one sequence, how long both may be, and which columns they came from. It needs
no tokenizer, so that other engines can read it.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from prefixtune.errors import CheckpointError, ConfigError, ContextLengthError, DataError, RequestError, short_repr

MAX_TEMPLATE_CHARS = 2**17
"""Longest template that a header may hold."""
MODEL_TEMPLATE = "model"
"""The chat template of a text format that is the backbone's own."""
TruncationPolicy = Literal["cut", "error"]
"""What happens to a source that is too long: it is truncated, or refused."""

_CHAT_FIELDS = ("chat_template", "template_hash", "system")
_MAX_REPEATS = 8
_Length = Annotated[int, Field(ge=0, lt=2**31)]
_Template = Annotated[str, Field(max_length=MAX_TEMPLATE_CHARS)]
_Token = Annotated[str, Field(max_length=256)]
_HINT = 'write for example {"prompt": "{source} =", "target": " {target}"}.'
_COLUMN = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class TextFormat:
    """How a source and a target become one sequence (the authors' format: ` {source} <sep> {target} <end>`).

    `{separator}` means a special token: the tokenizer's beginning-of-sequence token, or its end-of-sequence token
    where it has none. All fields are stored in a prefix's header under `text_format`, so that a source is
    formatted, and cut, as in training.

    Attributes:
        prompt: Template of what the model reads; has `{source}` once and may have `{separator}`.
        target: Template of what the model learns to write; has `{target}` once; the end token follows it.
        separator: What `{separator}` means; empty: the separator of the tokenizer in use.
        end: The end token of the training's tokenizer; for people and other programs.
        source: The column or template from which sources were made; empty: the task's own.
        target_template: The same for targets.
        max_length: Positions of source and target together (of each, for an encoder-decoder); 0: the backbone's.
        on_too_long: `cut` a too long source at its end, or refuse it (`error`).
        longest_target: Tokens of the longest target in training, its end token included; 0: unknown.
        longest_prompt: Tokens of the longest prompt that training, development data included, did not cut; 0: unknown.
        chat_template: What writes a conversation: `model`, the backbone's own chat template, or the text of a Jinja
            template; empty: nothing, and source and target are written by `prompt` and `target`.
        template_hash: With `model`: tells that template from another one.
        system: The system message of a conversation that has none; empty: none.

    Raises:
        ValidationError: A name is unknown, or a value has a wrong type or is out of range.
        DataError: A template lacks its text or repeats it, or the separator is there too often.
    """

    prompt: _Template = " {source} {separator}"
    target: _Template = " {target} "
    separator: _Token = ""
    end: _Token = ""
    source: _Template = ""
    target_template: _Template = ""
    max_length: _Length = 0
    on_too_long: TruncationPolicy = "error"
    longest_target: _Length = 0
    longest_prompt: _Length = 0
    chat_template: _Template = ""
    template_hash: _Template = ""
    system: _Template = ""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TextFormat:
        """From a dict of some fields.

        Raises:
            ConfigError: A name is unknown, or a value has a wrong type.
            DataError: As for the class.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"text format: it is {short_repr(values)}, but must be an object.", hint=_HINT)
        try:
            return cls(**{str(name): value for name, value in values.items()})
        except ValidationError as error:
            fault = error.errors(include_url=False, include_input=False)[0]
            raise ConfigError(f"text format: {fault['loc'][0]}: {fault['msg']}.", hint=_HINT) from None

    def __post_init__(self) -> None:
        # A prompt or a target may have any words in braces; in the other two each is a column.
        for name, needed in (("prompt", "source"), ("target", "target"), ("source", ""), ("target_template", "")):
            counts = Counter(_COLUMN.findall(getattr(self, name)))
            repeated = counts["separator"] if needed else max(counts.values(), default=0)
            if (needed and counts[needed] != 1) or repeated > _MAX_REPEATS:
                raise DataError(
                    f"text format: {name} template {short_repr(getattr(self, name))} lacks a text, or repeats one.",
                    hint="write {source} of a prompt or {target} of a target once, and no other more than "
                    f"{_MAX_REPEATS} times.",
                )
        if "{source}" in self.separator:
            raise DataError("text format: the separator contains {source}.", hint="the separator is a token's text.")

    @property
    def is_chat(self) -> bool:
        """Whether a chat template writes sources and targets, so that whole conversations can be read."""
        return bool(self.chat_template)

    def format_prompt(self, source: str, separator: str) -> str:
        """The text before the target.

        >>> TextFormat().format_prompt("name : Aromi", "<sep>")
        ' name : Aromi <sep>'

        Args:
            source: The source.
            separator: The tokenizer's, used where the format has none.
        """
        before, after = self.around(separator)
        return f"{before}{source}{after}"

    def around(self, separator: str) -> tuple[str, str]:
        """The text before and after a source.

        >>> TextFormat().around("<sep>"), TextFormat(separator="<s>").around("<sep>")
        ((' ', ' <sep>'), (' ', ' <s>'))
        """
        # Split first: a separator's text could contain or complete `{source}`.
        before, after = self.prompt.split("{source}")
        text = self.separator or separator
        return before.replace("{separator}", text), after.replace("{separator}", text)

    def format_target(self, target: str) -> str:
        """The text that the model learns to write, without its end token.

        >>> TextFormat().format_target("Aromi is a pub.")
        ' Aromi is a pub. '
        """
        return self.target.replace("{target}", target)

    @property
    def target_words(self) -> tuple[str, str]:
        """The words before and after a target, without outer space.

        >>> TextFormat(target=" Answer: {target} !").target_words
        ('Answer:', '!')
        """
        head, tail = self.target.split("{target}")
        return head.strip(), tail.strip()

    def extract_target(self, output: str) -> str:
        """The target within an output: what `format_target` put around it is removed, and so is outer space.

        >>> TextFormat(target="Answer: {target} !").extract_target(" Answer: Aromi. ! ")
        'Aromi.'
        """
        head, tail = self.target_words
        return output.strip().removeprefix(head).removesuffix(tail).strip()

    def source_room(self, length: int, positions: int | None, new_tokens: int, *, apart: bool = False) -> int | None:
        """Most tokens that are kept of a prompt; None: all.

        A prompt is not cut if training left one of its length uncut. A longer one gets the room that training gave a
        source with the longest target.

        >>> form = TextFormat(max_length=100, longest_target=30, longest_prompt=80)
        >>> form.source_room(80, 1000, 50), form.source_room(81, 1000, 50), TextFormat().source_room(80, 1000, 50)
        (950, 70, 950)

        Args:
            length: The prompt's tokens.
            positions: The model's, without those that the prefix takes; None: any number.
            new_tokens: Most tokens that are to be generated.
            apart: An encoder reads the source, so that the target takes none of its positions.
        """
        rooms = [] if positions is None else [positions if apart else positions - new_tokens]
        if length > self.longest_prompt:
            limits = [self.max_length] if self.max_length else []
            if positions is not None and self.longest_prompt:
                # They limited training too.
                limits.append(positions)
            rooms += [limit if apart else limit - self.longest_target for limit in limits]
        return min(rooms, default=None)

    def fitting_tokens(self, length: int, room: int | None, new_tokens: int) -> int:
        """Most tokens to generate: no more than fit, behind a prompt of a length that training left uncut.

        >>> form = TextFormat(longest_prompt=80)
        >>> form.fitting_tokens(80, 20, 50), form.fitting_tokens(81, 20, 50), form.fitting_tokens(80, None, 50)
        (20, 50, 50)

        Args:
            length: The prompt's tokens.
            room: Positions behind it; None: any number.
            new_tokens: Most tokens that are wanted.
        """
        if room is None or room <= 0 or length > self.longest_prompt:
            return new_tokens
        return min(room, new_tokens)

    def with_lengths(self, max_length: int = 0, on_too_long: Literal["", TruncationPolicy] = "") -> TextFormat:
        """The same with another treatment of long sources; 0 and an empty text change nothing."""
        narrower = max_length and (not self.max_length or max_length < self.max_length)
        return dataclasses.replace(
            self,
            max_length=max_length or self.max_length,
            on_too_long=on_too_long or self.on_too_long,
            # A prompt that training left uncut may be too long now.
            longest_prompt=0 if narrower else self.longest_prompt,
        )

    def to_dict(self) -> dict[str, Any]:
        """As stored in a prefix's header; without a chat template nothing that older readers do not know."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if value or name not in _CHAT_FIELDS}


def read_text_format(header: Mapping[str, Any]) -> TextFormat | None:
    """The text format that a header stores; None: it stores none, and the backbone's default applies.

    Fields that older files lack keep their old meaning: a source that is too long is refused.

    Raises:
        CheckpointError: It cannot be used; the message says why.
    """
    stored = header.get("text_format")
    if stored is None:
        return None
    try:
        return TextFormat.from_dict(stored)
    except (ConfigError, DataError) as error:
        raise CheckpointError(f"the header's {error.message}", hint="get it again, or upgrade prefixtune.") from error


def cut_prompt(
    ids: Sequence[int],
    room: int,
    around: Callable[[], tuple[int, int]],
    *,
    on_too_long: TruncationPolicy = "cut",
    name: str = "the text",
    beside: int = 0,
) -> list[int]:
    """A prompt's tokens; where they are more than `room`, the source in it is cut at its end, or refused.

    This is the one place where something is cut: training calls it with the room that a target leaves, generation with
    what the tokens to generate leave (see `data.truncation`). The text around the source stays. Targets are never cut.

    >>> cut_prompt([1, 2, 3, 4, 5, 0], 4, lambda: (0, 1)), cut_prompt([1, 0], 4, lambda: (0, 1))
    ([1, 2, 3, 0], [1, 0])

    Args:
        ids: The prompt's.
        room: Most tokens of it; below 0, where what is beside it does not fit by itself.
        around: Returns how many tokens are before and after the source; called only if the source is to be cut.
        on_too_long: `cut` it, or raise an `error`.
        name: The text's name in messages.
        beside: Tokens of a target, or to generate, for messages.

    Raises:
        RequestError: It is too long and must not be cut, or nothing of its source would stay.
    """
    if len(ids) <= room:
        return list(ids)
    if on_too_long == "error":
        raise ContextLengthError(
            f"{name} takes {len(ids)} tokens, but only {max(room, 0)} are left beside the {beside} of its answer.",
            hint="shorten it, raise max_length, or let on_too_long = 'cut' shorten it.",
        )
    before, after = around()
    if room <= before + after:
        raise ContextLengthError(
            f"{name} takes {len(ids)} tokens, {before + after} of them around its source, but the positions leave room "
            f"for {max(room, 0)} besides {beside} of its answer, and a cut would leave nothing of the source.",
            hint="raise max_length, or shorten the target, max_new_tokens or the prefix; targets are never cut.",
        )
    return [*ids[: room - after], *ids[len(ids) - after :]]


# --- before a text is tokenized -------------------------------------------------------------------------------------

_CHARACTERS = 6
"""Of a token, more than in most texts; where a text has more, a longer beginning is tried."""
_MARGIN = 64
"""Tokens that a beginning may have more than the whole text has there, as it ends within a word."""


def check_characters(text: str, name: str = "a text") -> None:
    """Refuse what no UTF-8 text is; `name` is what a message calls it.

    Raises:
        RequestError: It holds half a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"{name} holds half a surrogate pair at position {error.start}, which is no character."
        raise RequestError(what, hint="write UTF-8 text.") from None


class _Encodes(Protocol):
    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""


def bounded(tokenizer: _Encodes, text: str, positions: int | None) -> str:
    """A text; of one that cannot fit, a beginning that cannot fit either: its tokens are too many, or are cut anyway.

    Every text from outside goes through here before it is tokenized, in training, in inference and in the servers: a
    tokenizer takes a second and 350 MB for a megabyte, and a model's positions hold a small part of it. No number of
    characters per token is safe for all tokenizers (a thousand spaces may be one token), so a beginning is measured.

    Args:
        tokenizer: Makes token ids of a text: a backbone, or what a server knows of one.
        text: A source, a message or a target, or a whole prompt.
        positions: Most tokens that could fit; None: any number, so that nothing is too long.

    Raises:
        RequestError: It holds half a surrogate pair.
    """
    check_characters(text)
    if positions is None:
        return text
    size = max(_CHARACTERS * positions, 1024)
    while size < len(text):
        if len(tokenizer.encode(text[:size])) > positions + _MARGIN:
            return text[:size]
        size *= 2
    return text
