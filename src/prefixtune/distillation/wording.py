"""How questions are asked, how a text stands in the model's view before them, and both as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from prefixtune.attention.record import prefix_from_tokens
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.batch import SoftLabels
from prefixtune.data.chat import chat_format, end_ids, has_chat_template, literal_format
from prefixtune.data.encoding import TokenizedExample, default_format, encode_examples
from prefixtune.data.examples import Example, Message
from prefixtune.distillation.config import DistillConfig
from prefixtune.distillation.inputs import Question
from prefixtune.errors import ConfigError
from prefixtune.prefix.chat_format import render_chat
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import MODEL_TEMPLATE, TextFormat

_PLAIN = {
    "document": ("Question: {source}\nAnswer:", " {target}\n"),
    "prompt": ("Input: {source}\nOutput:", " {target}\n"),
}

_SENTENCE = "The Owl goes to Ashby at noon. Where does it go?"
ANSWER_MARGIN = 4
"""Tokens more than the longest given answer that a model may write, so that a longer one is seen to be another."""
_FEW_TOKENS = 12
"""Fewer than any window of a model that is trained."""
_MOST_DIFFERENCE = 0.1
"""Between a model's reading of a text and of its prefix, relative to the numbers themselves: what rounding may do."""


@dataclass(frozen=True)
class Wording:
    """The text around questions and answers, and around a text that is in view.

    Attributes:
        prompt: Template of a question, with `{source}`.
        target: Template of an answer, with `{target}`.
        chat: The text in view is the chat template's system message; otherwise it stands alone, before an empty line.
        tuned: The teacher was trained with this wording, so that it also says where an answer ends.
        lines: An answer may have several lines: where a line break follows it, it ends where the next prompt begins.
        bare: Template of a question that no text stands before; empty: `prompt`.
    """

    prompt: str
    target: str
    chat: bool = False
    tuned: bool = False
    lines: bool = False
    bare: str = ""

    @property
    def text_format(self) -> TextFormat:
        """As a text format."""
        return TextFormat(self.prompt, self.target)

    @property
    def ends_with_line(self) -> bool:
        """Whether a line break follows every answer."""
        return self.target.endswith("}\n")

    @property
    def stop(self) -> tuple[str, ...]:
        """What ends an answer, beside the end token."""
        head = self.prompt.split("{source}")[0].strip() if self.lines else ""
        if not self.ends_with_line or (self.lines and not head):
            return ()
        return (f"\n{head}",)

    def alone(self) -> Wording:
        """The wording of a question with nothing before it: with a chat template, that of the user's turn alone."""
        return replace(self, prompt=self.bare) if self.bare else self

    def view(self, backbone: Backbone, text: str) -> str:
        """A text as it stands in view before a question, behind what the tokenizer begins every text with (Gemma)."""
        if self.chat:
            return _render(backbone, Message("system", text), prompt=False)
        return f"{backbone.tokenizer.bos_token if backbone.begins_texts else ''}{text.strip()}\n\n"


def choose_wording(config: DistillConfig, backbone: Backbone, teacher_format: TextFormat | None) -> Wording:
    """The wording that the options ask for.

    Args:
        config: The options.
        backbone: The student.
        teacher_format: What the teacher was trained with; None: nothing. It is then asked as for a prompt; an
            encoder-decoder reads the input alone.

    Raises:
        ConfigError: A chat template is asked for, and the backbone has none, or one without a system message before a
            text; or its answers end with another token than the backbone's.
    """
    subject, ask, has_template = config.subject, config.ask, has_chat_template(backbone)
    tuned = ask == "auto" and subject != "document" and teacher_format is not None
    if ask == "auto" and subject != "document" and has_template:
        # No text stands before a teacher's question: any template will do whose answers end where they end here.
        ask = "chat" if subject == "prompt" or not end_ids(backbone) else "plain"
    if tuned and teacher_format is not None:
        wording = replace(_single_turn(backbone, teacher_format), tuned=True)
    elif ask == "chat" and not has_template:
        raise ConfigError(f"{backbone.name!r} has no chat template.", hint="use --ask plain.")
    elif ask == "chat" and subject == "teacher":
        wording = _single_turn(backbone, chat_format(backbone, MODEL_TEMPLATE))
    elif ask == "chat":
        wording = _chat_wording(backbone)
    elif backbone.kind != "decoder":
        own = default_format(backbone)
        wording = Wording(own.prompt, own.target)
    else:
        wording = Wording(*_PLAIN["document" if subject == "document" else "prompt"])
    if config.prompt_format:
        wording = replace(wording, prompt=config.prompt_format, bare="")
    # What an input asks for may have lines; what a document is asked about, and a trained teacher, answers in one.
    lines = subject != "document" and not tuned and not wording.prompt.startswith("{source}")
    return replace(wording, target=config.target_format or wording.target, lines=lines)


def _single_turn(backbone: Backbone, text_format: TextFormat) -> Wording:
    """A text format's wording of a question that no text stands before.

    Raises:
        ConfigError: Its answers end with another token than the backbone's.
    """
    if end_ids(backbone, text_format):
        raise ConfigError(
            f"the chat template ends an answer with {text_format.end!r}, the model with {backbone.end!r}.",
            hint="choose --ask plain.",
        )
    literal = literal_format(backbone, text_format)
    return Wording(literal.prompt, literal.target)


def _chat_wording(backbone: Backbone) -> Wording:
    """The user's turn of the chat template, which follows a system message.

    Raises:
        ConfigError: In its template no system message stands apart.
        RequestError: It refuses a system message.
    """
    system, user = Message("system", "S"), Message("user", "{source}")
    whole = _render(backbone, system, user, prompt=True)
    turn = whole.removeprefix(_render(backbone, system, prompt=False))
    if turn == whole or turn.count("{source}") != 1:
        raise ConfigError(
            f"the chat template of {backbone.name!r} keeps no system message apart.", hint="use --ask plain."
        )
    bare = _render(backbone, user, prompt=True)
    return Wording(turn, "{target}", chat=True, bare=bare if bare.count("{source}") == 1 else "")


def _render(backbone: Backbone, *messages: Message, prompt: bool) -> str:
    """What the backbone's chat template writes, with what opens the next answer or without."""
    own = TextFormat("{source}", "{target}", chat_template=MODEL_TEMPLATE)
    return render_chat(
        backbone.tokenizer, own, [message._asdict() for message in messages], add_generation_prompt=prompt
    )


def in_view(backbone: Backbone, wording: Wording, text: str) -> Prefix:
    """A text in view as a prefix: the keys and values that the model computes for it, uncut."""
    ids = torch.tensor([backbone.encode(wording.view(backbone, text))], device=backbone.device)
    return prefix_from_tokens(backbone.model, backbone.layout, ids)


@torch.no_grad()
def check_view(backbone: Backbone) -> None:
    """Refuse a model to which a text as a prefix is less than the text itself.

    Raises:
        ConfigError: Some of its layers mix positions by something else than attention.
    """
    ids = torch.tensor([backbone.encode(_SENTENCE)[:_FEW_TOKENS]], device=backbone.device)
    half = ids.shape[1] // 2
    view = prefix_from_tokens(backbone.model, backbone.layout, ids[:, :half])
    whole = backbone.forward(ids).logits[:, half:].float()
    seen = backbone.forward(ids[:, half:], prefixes=view).logits.float()
    if not float((seen - whole).norm()) <= _MOST_DIFFERENCE * float(whole.norm()):
        raise ConfigError(
            f"{backbone.name!r} does not read all of a text that is in view as a prefix: some of its layers mix "
            "positions by something else than attention, as those of state-space models do.",
            hint="choose a backbone with attention alone; or train on questions with answers (`prefixtune train`).",
        )


# --- questions as tokens ----------------------------------------------------------------------------------------------


def encode_questions(
    backbone: Backbone, questions: Sequence[Question], wording: Wording, prefix_length: int
) -> list[TokenizedExample]:
    """Questions with answers as token ids; a question that is too long is cut as in training."""
    if not questions:
        return []
    examples = [Example(question.question, (question.answer or "",)) for question in questions]
    return list(encode_examples(backbone, examples, wording.text_format, prefix_length=prefix_length).examples)


def count_endings(backbone: Backbone, questions: Sequence[Question], wording: Wording) -> list[int]:
    """Per question, the tokens that end its target: those of the template's end, and the end token."""
    answers = [question.answer or "" for question in questions]
    head, tail = wording.target.split("{target}")
    if not tail:
        return [1] * len(answers)
    whole = backbone.encode_targets([wording.text_format.format_target(answer) for answer in answers])
    # A tokenizer may join the end with what stands before it, or put a mark in front of a text.
    open_ended = backbone.encode_targets([f"{head}{answer}" for answer in answers])
    return [max(len(ids) - len(without), 0) + 1 for ids, without in zip(whole, open_ended, strict=True)]


def without_end(example: TokenizedExample, count: int) -> TokenizedExample:
    """An example of one target without the last `count` labels of it; at least one stays."""
    (target,), kept = example.targets, max(len(example.targets[0]) - count, 1)
    soft = tuple(SoftLabels(labels.ids[:kept], labels.log_probs[:kept]) for labels in example.soft_targets)
    return replace(example, targets=(target[:kept],), soft_targets=soft)


def without_ends(
    backbone: Backbone,
    examples: Sequence[TokenizedExample],
    questions: Sequence[Question],
    wording: Wording,
    *,
    ended: bool,
) -> list[TokenizedExample]:
    """The questions' examples, of which those whose answer has ended, or those whose answer was cut, lose their end."""
    counts = count_endings(backbone, questions, wording)
    return [
        without_end(example, count) if question.ended is ended else example
        for example, question, count in zip(examples, questions, counts, strict=True)
    ]
