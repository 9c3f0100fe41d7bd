"""What the model itself says of a prefix, whether its words can stand in its place, and what it says off the topic.

After InSPEcT (2025): the prefix stands in front of a text that asks for the description of a task.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from prefixtune.data.chat import end_of_turn
from prefixtune.data.examples import Example, Message, conversation_of
from prefixtune.errors import PrefixError
from prefixtune.explain.ablation import losses_of
from prefixtune.explain.subject import Subject, View
from prefixtune.inference.generate import generate
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat
from prefixtune.training.silence import bare_texts, measure_silence

_FEW_SHOT = (
    "Task description: translate the sentence into French.\n"
    "Task description: say whether the review is positive or negative.\n"
    "Task description: answer the question from the passage.\n"
    "Task description:"
)
_PLAIN = "In one sentence, the task is to"
UNRELATED = "count the letters of the word."
"""A description of another task, whose score shows what any such words bring."""
_NEW_TOKENS, _LONGEST, _ROWS = 32, 200, 16
_LEAST_GAIN = 0.01
"""In nats per label: a prefix that gains less has nothing to be described."""


def questions(subject: Subject) -> dict[str, str]:
    """Name -> the text that asks for a description; only those that fit the backbone's positions."""
    asked = {"few_shot": _FEW_SHOT, "plain": _PLAIN}
    taken = subject.backbone.prefix_positions(subject.longest) + _NEW_TOKENS
    room = (subject.backbone.max_positions or math.inf) - taken
    return {name: text for name, text in asked.items() if len(subject.backbone.encode(text)) <= room}


def description_view(subject: Subject) -> View:
    """Descriptions with the prefix, without it and with its controls, each with its faithfulness on the data."""
    if subject.prefix.head is not None:
        return View("description", left_out="labels come from a trained head: the model writes no text.")
    asked = questions(subject)
    if not asked:
        return View("description", left_out="no question fits the backbone's positions beside the prefix.")
    spoken: dict[str, Prefix | None] = {"prefix": subject.prefix, "bare": None}
    spoken |= {name: prefix for name, prefix in subject.controls.items() if name != "shuffled"}
    texts = {name: _describe(subject, asked, prefix) for name, prefix in spoken.items()}
    bare, with_prefix = (_losses(subject, "", prefix) for prefix in (None, subject.prefix))
    known: dict[str, float | None] = {"": None}

    def score(text: str) -> dict[str, Any]:
        if text not in known:
            try:
                known[text] = _losses(subject, text, None)
            except PrefixError:  # with these words, a row no longer fits
                known[text] = None
        found = faithfulness(known[text], bare, bare - with_prefix)
        return {"text": text, "loss": known[text], "faithfulness": found}

    numbers = {
        "questions": asked,
        "rows": min(_ROWS, len(subject.examples)),
        "bare_loss": bare,
        "prefix_loss": with_prefix,
        "descriptions": {name: {key: score(text) for key, text in by.items()} for name, by in texts.items()},
        "unrelated": score(UNRELATED),
    }
    return View("description", numbers)


def general_view(subject: Subject) -> View:
    """How the prefix, and random numbers, change what the bare model writes to requests about other things."""
    if subject.labels is not None or subject.backbone.kind == "encoder":
        return View("general", left_out="the prefix gives labels, and writes no text.")
    compared = {"prefix": subject.prefix, "random": subject.controls["random"]}
    texts = bare_texts(subject.backbone, subject.text_format, subject.prefix.length())
    found = measure_silence(subject.backbone, compared, texts)
    return View("general", found, "" if found else "no request fits the backbone's positions beside the prefix.")


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
    return replace(example, source=asked.content, messages=(*earlier, asked))


def _losses(subject: Subject, description: str, prefix: Prefix | None) -> float:
    """The loss per label of the first rows, with a description in front of each prompt."""
    literal = description.replace("{", "(").replace("}", ")")
    text_format, examples = subject.text_format, subject.examples[:_ROWS]
    if description and text_format.is_chat:
        examples = tuple(_preceded(example, description) for example in examples)
    elif description:
        text_format = replace(text_format, prompt=f"{literal}\n{text_format.prompt}")
    if description and text_format.max_length:
        # The words take nothing from the rows.
        more = len(subject.backbone.encode(f"{literal}\n"))
        text_format = replace(text_format, max_length=text_format.max_length + more)
    rows = subject.tokenize(examples, text_format, subject.prefix.prefix_length).examples[: len(subject.tokenized)]
    sums = losses_of(subject, rows, prefix).sum(0)
    return float(sums[0] / sums[1])
