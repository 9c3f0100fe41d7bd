"""Text formats that instruct the bare model, or show it solved examples (few-shot prompting)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from prefixtune.backbone.backbone import Backbone
from prefixtune.data.chat import end_of_turn
from prefixtune.data.encoding import default_format
from prefixtune.data.examples import Example
from prefixtune.errors import DataError
from prefixtune.prefix.text_format import TextFormat


def few_shot_format(text_format: TextFormat, examples: Sequence[Example], separator: str, end: str) -> TextFormat:
    """A text format that shows a few solved examples before the source, in the same format.

    >>> shown = few_shot_format(TextFormat("{source} =", " {target}"), [Example("1+1", ("2",))], "", ".")
    >>> shown.format_prompt("2+3", "")
    '1+1 = 2.2+3 ='

    Args:
        text_format: The format without examples.
        examples: The examples to show, each with its first target.
        separator: What the format's `{separator}` means.
        end: The text that ends a target.

    Raises:
        DataError: The format has a chat template, or an example contains a placeholder of the template.
    """
    if text_format.is_chat:
        raise DataError(
            "solved examples cannot be shown in a chat template.",
            hint="give conversations whose earlier turns are the examples.",
        )
    _check_examples(examples)
    shown = "".join(
        text_format.format_prompt(example.source, separator) + text_format.format_target(example.targets[0]) + end
        for example in examples
    )
    return dataclasses.replace(text_format, prompt=shown + text_format.prompt)


def instruction_format(backbone: Backbone, instruction: str, examples: Sequence[Example] = ()) -> TextFormat:
    """A text format that instructs the bare model, and may show it a few solved examples.

    If the tokenizer has a chat template, it is used, and outputs end where its turns do; otherwise instruction and
    examples are put before the source, which is formatted as for a prefix.

    Args:
        backbone: The model.
        instruction: What to do with the source, in words.
        examples: The examples to show, each with its first target.

    Raises:
        DataError: The instruction or an example contains a placeholder of the template.
    """
    _check_literal(instruction, f"the instruction {instruction[:60]!r}", "word it otherwise.")
    _check_examples(examples)
    tokenizer = backbone.tokenizer
    if backbone.kind == "decoder" and tokenizer.chat_template:
        turns = []
        for example in examples:
            turns += [("user", f"{instruction}\n{example.source}"), ("assistant", example.targets[0])]
        turns.append(("user", f"{instruction}\n{{source}}"))
        messages = [{"role": role, "content": content} for role, content in turns]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return TextFormat(str(prompt), "{target}", end=end_of_turn(backbone))
    shown = few_shot_format(default_format(backbone), examples, backbone.separator, backbone.end)
    return dataclasses.replace(shown, prompt=f"{instruction}\n{shown.prompt}")


def _check_examples(examples: Sequence[Example]) -> None:
    """Refuse examples that would change the template that they are shown in."""
    for number, example in enumerate(examples, start=1):
        for text in (example.source, example.targets[0]):
            _check_literal(text, f"example {number} ({example.source[:60]!r})", "show others, or leave it out.")


def _check_literal(text: str, name: str, hint: str) -> None:
    for placeholder in ("{source}", "{separator}"):
        if placeholder in text:
            raise DataError(f"{name} contains {placeholder}, which is a placeholder in a text format.", hint=hint)
