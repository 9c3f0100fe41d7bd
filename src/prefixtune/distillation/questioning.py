"""Questions that are made from a document (`--questions self`), and answers that the teacher writes."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from prefixtune.backbone.backbone import Backbone
from prefixtune.data.encoding import encode_prompts
from prefixtune.distillation.config import KINDS, QuestionKind
from prefixtune.distillation.documents import Question
from prefixtune.distillation.teacher import Teacher
from prefixtune.distillation.wording import Wording
from prefixtune.errors import DataError
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import complete
from prefixtune.inference.prompts import Prompt, check_requests
from prefixtune.prefix.prefix import Prefix

__all__ = ["answer_questions", "asking_tokens", "hold_out", "make_questions"]

_ROUNDS = 3
"""How often the model is asked again where its questions were unusable or known."""
_MOST_CHARS = 300
"""Longest question."""
_QUESTION_TOKENS = 48
"""Most tokens of a question that the model makes."""
_HELD_OUT = 10
"""One in ten of the questions that are made here is held out for the report."""
_ABOUT_SENTENCE = "\nA question about this sentence:\nQuestion:"
_IN_OTHER_WORDS = "Question: {question}\nThe same in other words:\nQuestion:"
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_NAME = re.compile(r"\b[A-Z][\w'-]+(?: [A-Z][\w'-]+)*")
_SUMMARY = ("Summarize the text.", "What is the text about?", "Give the main points of the text.")
_LIST = ("List what the text says about {name}.", "What is known about {name}?", "Name the facts about {name}.")

Progress = Callable[[int], None]


def make_questions(
    teacher: Teacher,
    chunks: Sequence[str],
    views: Sequence[Prefix],
    *,
    count: int,
    kinds: Sequence[QuestionKind],
    seed: int,
    batch_size: int,
    on_batch: Progress,
) -> list[Question]:
    """Questions about a document, no two alike, the same for the same seed.

    `fact`: the model asks about a sentence; `paraphrase`: it asks such a question in other words; `list` and `summary`:
    templates, about the names in the text and about the whole; `continuation`: a sentence is to be completed, and the
    document itself is the answer.

    Args:
        teacher: Who makes them.
        chunks: The document's pieces.
        views: Each piece in the teacher's view.
        count: Questions to make; fewer where the text gives no more.
        kinds: What they ask for, in equal shares; paraphrases only together with facts.
        seed: Of all choices.
        batch_size: Texts in one pass.
        on_batch: Called with the number of questions so far.

    Raises:
        DataError: There is no question.
    """
    rng = random.Random(f"{seed}/questions")
    made: dict[str, Question] = {}

    def add(question: Question) -> None:
        key = " ".join(question.question.casefold().split())
        if 3 <= len(key) <= _MOST_CHARS and any(letter.isalpha() for letter in key):
            made.setdefault(key, question)

    # Facts come before their paraphrases, in whatever order they are named.
    ordered = [kind for kind in KINDS if kind in kinds]
    for number, kind in enumerate(ordered):
        share = count * (number + 1) // len(ordered) - count * number // len(ordered)
        wanted = min(len(made) + share, count)
        if kind in ("fact", "paraphrase"):
            for attempt in range(_ROUNDS):
                known = list(made.values())
                prompts = _prompts(kind, chunks, known, wanted - len(made), rng)
                texts = _ask(teacher, prompts, views, f"{seed}{number}{attempt}", batch_size)
                for (chunk, about, _), text in zip(prompts, texts, strict=True):
                    add(Question(_first_question(text), None, chunk, kind, about))
                    if len(made) >= wanted:
                        break
                on_batch(len(made))
        else:
            for question in _templates(kind, chunks, rng):
                if len(made) >= wanted:
                    break
                add(question)
        on_batch(len(made))
    if not made:
        raise DataError(
            "no question was made from the document.",
            hint="give a longer text or other --kinds, or write --questions FILE.",
        )
    return list(made.values())


def hold_out(questions: Sequence[Question], seed: int) -> tuple[list[Question], list[Question]]:
    """Questions to train on, and about a tenth of them held out; fewer than ten: none.

    Questions about one sentence or one name stay together, so that no other wording of a held-out one is trained on.
    Those about the whole are trained on.

    Args:
        questions: All that were made.
        seed: Of the choice.
    """
    wanted = len(questions) // _HELD_OUT
    sizes = Counter(question.about for question in questions if question.about)
    groups = sorted(sizes)
    random.Random(f"{seed}/held out").shuffle(groups)
    chosen: set[str] = set()
    count = 0
    for group in sorted(groups, key=sizes.__getitem__):
        # Never more than half: the rest is to be learned.
        if count < wanted and 2 * (count + sizes[group]) <= len(questions):
            chosen.add(group)
            count += sizes[group]
    kept = [question for question in questions if question.about not in chosen]
    return kept, [question for question in questions if question.about in chosen]


def asking_tokens(backbone: Backbone, text: str, kinds: Sequence[QuestionKind]) -> tuple[int, int]:
    """The most tokens behind a text in view while questions are made of it, and of a question with its given answer.

    Args:
        backbone: Whose tokens are counted.
        text: The whole document.
        kinds: What the questions ask for.
    """

    def longest(texts: Iterable[str]) -> int:
        return max((len(backbone.encode(text)) for text in texts), default=0)

    sentence = longest(_sentences(text))
    name = longest({name for name in _NAME.findall(text) if len(name) <= _MOST_CHARS})
    around = longest([*_SUMMARY, *_LIST, "Summarize what the text says about .", "Continue the text: "])
    asking = {
        "fact": sentence + longest([_ABOUT_SENTENCE]) + _QUESTION_TOKENS,
        "paraphrase": 2 * _QUESTION_TOKENS + longest([_IN_OTHER_WORDS]),
    }
    asked = {"fact": _QUESTION_TOKENS, "paraphrase": _QUESTION_TOKENS, "continuation": sentence + around}
    most = max((asked.get(kind, name + around) for kind in kinds), default=0)
    return max((asking.get(kind, 0) for kind in kinds), default=0), most


def _sentences(chunk: str) -> list[str]:
    """The sentences of a piece that say something: of four words or more, and not too long."""
    parts = (part.strip() for part in _SENTENCE.split(chunk))
    return [part for part in parts if len(part.split()) >= 4 and len(part) <= 2 * _MOST_CHARS]


def _prompts(
    kind: QuestionKind, chunks: Sequence[str], known: Sequence[Question], count: int, rng: random.Random
) -> list[tuple[int, str, str]]:
    """What the model continues with a question, after the piece and the sentence that it is about."""
    if count <= 0:
        return []
    if kind == "paraphrase":
        facts = [question for question in known if question.kind == "fact"]
        chosen = [rng.choice(facts) for _ in range(count)] if facts else []
        return [(fact.chunk, fact.about, _IN_OTHER_WORDS.format(question=fact.question)) for fact in chosen]
    pairs = [(index, sentence) for index, chunk in enumerate(chunks) for sentence in _sentences(chunk)]
    if not pairs:
        return []
    rng.shuffle(pairs)
    chosen_pairs = [pairs[index % len(pairs)] for index in range(count)]
    return [(chunk, sentence, f"{sentence}{_ABOUT_SENTENCE}") for chunk, sentence in chosen_pairs]


def _ask(
    teacher: Teacher, prompts: Sequence[tuple[int, str, str]], views: Sequence[Prefix], seed: str, batch_size: int
) -> list[str]:
    """What the model writes after each prompt, up to the end of the line."""
    if not prompts:
        return []
    config = GenerateConfig(
        max_new_tokens=_QUESTION_TOKENS,
        temperature=0.9,
        top_p=0.95,
        seed=int(seed) % 2**31,
        stop=("\n",),
        batch_size=batch_size,
    )
    backbone = teacher.backbone
    asked = [Prompt(backbone.encode(text), views[chunk], _QUESTION_TOKENS) for chunk, _, text in prompts]
    check_requests(backbone, asked)
    return [output.text for _, output in sorted(complete(backbone, asked, config), key=lambda one: one[0])]


def _first_question(text: str) -> str:
    """The first question in what a model wrote; empty: there is none.

    >>> _first_question("Who drives the Owl? Answer: Mira"), _first_question("The Owl.")
    ('Who drives the Owl?', '')
    """
    return text[: text.index("?") + 1].strip() if "?" in text else ""


def _templates(kind: QuestionKind, chunks: Sequence[str], rng: random.Random) -> Iterator[Question]:
    """Questions without the model's help."""
    found: list[Question] = []
    for index, chunk in enumerate(chunks):
        if kind == "continuation":
            found.extend(_continuations(index, chunk))
            continue
        names = [name for name, _ in Counter(_NAME.findall(chunk)).most_common(200)]
        if kind == "summary":
            texts = [(text, "") for text in _SUMMARY]
            texts += [(f"Summarize what the text says about {name}.", name) for name in names]
        else:
            texts = [(template.format(name=name), name) for template in _LIST for name in names]
        found.extend(Question(text, None, index, kind, about) for text, about in texts)
    rng.shuffle(found)
    yield from found


def _continuations(index: int, chunk: str) -> Iterator[Question]:
    """The first words of each sentence, to be continued as the document does."""
    for sentence in _sentences(chunk):
        words = sentence.split()
        for share in (3, 2):
            cut = max(2, len(words) // share)
            yield Question(
                f"Continue the text: {' '.join(words[:cut])}", " ".join(words[cut:]), index, "continuation", sentence
            )


def answer_questions(
    teacher: Teacher,
    questions: Sequence[str],
    views: Sequence[Prefix | None],
    wording: Wording,
    *,
    answer_length: int,
    batch_size: int,
    on_batch: Progress = lambda done: None,
) -> list[tuple[str, bool]]:
    """What the teacher answers, greedily, and whether the answer ended by itself; empty where it says nothing.

    Args:
        teacher: Who answers.
        questions: As they are asked.
        views: Per question, what stands before it.
        wording: The text around questions and answers.
        answer_length: Most tokens of an answer.
        batch_size: Questions in one pass.
        on_batch: Called with the number of answers so far.

    Raises:
        RequestError: A question does not fit the model's positions with what is in view.
    """
    if not questions:
        return []
    backbone: Backbone = teacher.backbone
    config = GenerateConfig(max_new_tokens=answer_length, stop=wording.stop, batch_size=batch_size)
    prompts = encode_prompts(backbone, wording.text_format, questions)
    form = wording.text_format
    asked = [Prompt(list(ids), view, answer_length, (), form) for ids, view in zip(prompts, views, strict=True)]
    check_requests(backbone, asked)
    answers: list[tuple[str, bool]] = [("", False)] * len(asked)
    for done, (number, output) in enumerate(complete(backbone, asked, config), start=1):
        answers[number] = form.extract_target(output.text), output.finish_reason == "stop"
        on_batch(done)
    return answers
