"""What the model itself says of a prefix, and whether its words can stand in the prefix's place.

After InSPEcT (2025): the prefix stands in front of a text that asks for the description of a task.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from prefixtune.data.chat import end_of_turn
from prefixtune.data.examples import Example, Message, conversation_of
from prefixtune.errors import PrefixError
from prefixtune.explain.ablation import rows_of
from prefixtune.explain.subject import OUT_OF_TIME, Subject, View
from prefixtune.inference.generate import generate
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat

__all__ = ["UNRELATED", "description_view", "faithfulness", "questions"]


_FEW_SHOT = (
    "Task description: translate the sentence into French.\n"
    "Task description: say whether the review is positive or negative.\n"
    "Task description: answer the question from the passage.\n"
    "Task description:"
)
_PLAIN = "In one sentence, the task is to"
_ASK = "Describe in one sentence the task that you do."
UNRELATED = "count the letters of the word."
"""A description of another task, whose score shows what any such words bring."""
_NEW_TOKENS, _LONGEST, _ROWS = 32, 200, 16
_LEAST_GAIN = 0.01
"""In nats per label: a prefix that gains less has nothing to be described."""


def questions(subject: Subject) -> dict[str, str]:
    """Name -> the text that asks for a description; only those that fit the backbone's positions."""
    asked = {"few_shot": _FEW_SHOT, "plain": _PLAIN}
    tokenizer = subject.backbone.tokenizer
    if subject.backbone.kind == "decoder" and tokenizer.chat_template:
        message = [{"role": "user", "content": _ASK}]
        asked["chat"] = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    taken = subject.backbone.prefix_positions(subject.longest) + _NEW_TOKENS
    room = (subject.backbone.max_positions or math.inf) - taken
    return {name: text for name, text in asked.items() if len(subject.backbone.encode(text)) <= room}


def description_view(subject: Subject) -> View:
    """Descriptions with the prefix, without it and with its controls, each with its faithfulness on the data."""
    if subject.has_head:
        return View("description", left_out="labels come from a trained head: the model writes no text.")
    asked = questions(subject)
    if not asked:
        return View("description", left_out="no question fits the backbone's positions beside the prefix.")
    spoken: dict[str, Prefix | None] = {"prefix": subject.prefix, "bare": None}
    spoken |= {name: prefix for name, prefix in subject.controls.items() if name != "shuffled"}
    texts: dict[str, dict[str, str]] = {}
    for name in subject.timed(list(spoken)):
        texts[name] = _describe(subject, asked, spoken[name])
    if "prefix" not in texts:
        return View("description", left_out=OUT_OF_TIME)
    numbers: dict[str, Any] = {"questions": asked}
    notes = []
    if subject.tokenized:
        numbers |= _scores(subject, texts)
    else:
        notes.append("There is no data (--data): how faithful the descriptions are is not known.")
        numbers["descriptions"] = {name: {q: {"text": text} for q, text in by.items()} for name, by in texts.items()}
    return View("description", numbers, tuple(notes))


def _describe(subject: Subject, asked: Mapping[str, str], prefix: Prefix | None) -> dict[str, str]:
    """The first line that the model writes after each question."""
    outputs = generate(
        subject.backbone,
        list(asked.values()),
        None if prefix is None else Prefix(prefix.layers),
        text_format=TextFormat("{source}", "{target}", end=end_of_turn(subject.backbone)),
        max_new_tokens=_NEW_TOKENS,
        progress=False,
        stop=("\n",),
    )
    return {name: " ".join(text.split())[:_LONGEST] for name, text in zip(asked, outputs, strict=True)}


def _scores(subject: Subject, texts: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """The loss with each description in front of the prompt, beside that of the prefix and of the bare model."""
    bare, with_prefix = (_losses(subject, "", prefix) for prefix in (None, subject.prefix))
    gain = bare - with_prefix
    known: dict[str, float | None] = {}

    def score(text: str) -> dict[str, Any]:
        if text and text not in known and not subject.out_of_time():
            try:
                known[text] = _losses(subject, text, None)
            except PrefixError:  # with these words, a row no longer fits
                known[text] = None
        loss = known.get(text)
        return {"text": text, "loss": loss, "faithfulness": faithfulness(loss, bare, gain)}

    return {
        "rows": min(_ROWS, len(subject.examples)),
        "bare_loss": bare,
        "prefix_loss": with_prefix,
        "descriptions": {name: {question: score(text) for question, text in by.items()} for name, by in texts.items()},
        "unrelated": score(UNRELATED),
    }


def faithfulness(loss: float | None, bare: float, gain: float) -> float | None:
    """The share of the prefix's gain that a description brings in its place; below 0 where it harms.

    >>> faithfulness(2.0, 3.0, 2.0), faithfulness(3.5, 3.0, 2.0), faithfulness(2.0, 3.0, 0.0)
    (0.5, -0.25, None)

    Args:
        loss: With the description in front of the prompt, without the prefix; None: not known.
        bare: Without either.
        gain: `bare` minus the loss with the prefix; below 0.01 nats there is none to share.
    """
    return None if loss is None or gain < _LEAST_GAIN else (bare - loss) / gain


def _preceded(example: Example, description: str) -> Example:
    """The example with a description before its source, in the same user message."""
    *earlier, last = conversation_of(example)
    asked = Message("user", f"{description}\n{last.content}")
    return dataclasses.replace(example, source=asked.content, messages=(*earlier, asked))


def _losses(subject: Subject, description: str, prefix: Prefix | None) -> float:
    """The loss per label of the first rows, with a description in front of each prompt."""
    literal = description.replace("{", "(").replace("}", ")")
    text_format, examples = subject.text_format, subject.examples[:_ROWS]
    if description and text_format.is_chat:
        examples = tuple(_preceded(example, description) for example in examples)
    elif description:
        text_format = dataclasses.replace(text_format, prompt=f"{literal}\n{text_format.prompt}")
    if description and text_format.max_length:
        # The words take nothing from the rows.
        more = len(subject.backbone.encode(f"{literal}\n"))
        text_format = dataclasses.replace(text_format, max_length=text_format.max_length + more)
    rows = subject.tokenize(examples, text_format, subject.prefix.prefix_length).examples[: subject.limits.rows]
    return rows_of(subject, rows, prefix).mean
