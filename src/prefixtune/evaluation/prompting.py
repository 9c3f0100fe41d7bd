"""Prompting."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from prefixtune.backbone.backbone import Backbone
from prefixtune.data import Example
from prefixtune.data.encoding import default_format
from prefixtune.errors import DataError
from prefixtune.prefix.text_format import TextFormat

__all__ = ["with_shots"]


def with_shots(form: TextFormat, examples: Sequence[Example], separator: str, end: str) -> TextFormat:
    """A text format that shows a few solved examples before the source, in the same format.

    >>> shown = with_shots(TextFormat("{source} =", " {target}"), [Example("1+1", ("2",))], "", ".")
    >>> shown.format_prompt("2+3", "")
    '1+1 = 2.2+3 ='

    Args:
        form: The format without them.
        examples: To show; the first target of each.
        separator: What the format's `{separator}` stands for.
        end: What closes a target.

    Raises:
        DataError: An example holds what stands for the source or the separator.
    """
    _check_shown(examples)
    shots = "".join(form.format_prompt(e.source, separator) + form.format_target(e.targets[0]) + end for e in examples)
    return dataclasses.replace(form, prompt=shots + form.prompt)


def ask(backbone: Backbone, words: str, examples: Sequence[Example] = ()) -> TextFormat:
    """A text format that tells the bare model in words what to do, and shows it a few solved examples.

    As a chat where the tokenizer has a template for one; else words and examples stand before the source, which is as
    it is for a prefix.

    Args:
        backbone: Who is asked.
        words: The instruction.
        examples: To show; the first target of each.

    Raises:
        DataError: The instruction or an example holds what stands for the source or the separator.
    """
    _check_literal(words, f"the instruction {words[:60]!r}", "word it otherwise.")
    _check_shown(examples)
    tokenizer = backbone.tokenizer
    if backbone.kind == "decoder" and tokenizer.chat_template:
        turns = []
        for example in examples:
            turns += [("user", f"{words}\n{example.source}"), ("assistant", example.targets[0])]
        turns.append(("user", f"{words}\n{{source}}"))
        messages = [{"role": role, "content": content} for role, content in turns]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return TextFormat(str(prompt), "{target}")
    form = with_shots(default_format(backbone), examples, backbone.separator, backbone.end)
    return dataclasses.replace(form, prompt=f"{words}\n{form.prompt}")


def _check_shown(examples: Sequence[Example]) -> None:
    """Refuse examples that would change the template that they are shown in.

    Raises:
        DataError: One holds what stands for the source or the separator.
    """
    for number, example in enumerate(examples, start=1):
        for text in (example.source, example.targets[0]):
            _check_literal(text, f"example {number} ({example.source[:60]!r})", "show others, or leave it out.")


def _check_literal(text: str, name: str, hint: str) -> None:
    for place in ("{source}", "{separator}"):
        if place in text:
            raise DataError(f"{name} contains {place}, which means something else in a text format.", hint=hint)
