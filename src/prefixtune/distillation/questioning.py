"""Questions that are made from a document (`--questions self`), and answers that the teacher writes."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from prefixtune.backbone.backbone import Backbone
from prefixtune.data.encoding import encode_prompts
from prefixtune.distillation.config import QuestionKind
from prefixtune.distillation.documents import Question
from prefixtune.distillation.teacher import Teacher
from prefixtune.distillation.wording import Wording
from prefixtune.errors import DataError
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.detokenizer import text_until_stop
from prefixtune.inference.generate import generate_ids, read_output
from prefixtune.prefix.prefix import Prefix

__all__ = ["answer_questions", "make_questions"]

_ROUNDS = 3
"""How often the model is asked again where its questions were unusable or known."""
_MOST_CHARS = 300
"""Longest question."""
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
        kinds: What they ask for, in equal shares.
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

    for number, kind in enumerate(kinds):
        share = count * (number + 1) // len(kinds) - count * number // len(kinds)
        wanted = min(len(made) + share, count)
        if kind in ("fact", "paraphrase"):
            for attempt in range(_ROUNDS):
                known = list(made.values())
                prompts = _prompts(kind, chunks, known, wanted - len(made), rng)
                texts = _ask(teacher, prompts, views, f"{seed}{number}{attempt}", batch_size)
                for (chunk, _), text in zip(prompts, texts, strict=True):
                    add(Question(_first_question(text), None, chunk, kind))
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


def _sentences(chunk: str) -> list[str]:
    """The sentences of a piece that say something: of four words or more, and not too long."""
    parts = (part.strip() for part in _SENTENCE.split(chunk))
    return [part for part in parts if len(part.split()) >= 4 and len(part) <= 2 * _MOST_CHARS]


def _prompts(
    kind: QuestionKind, chunks: Sequence[str], known: Sequence[Question], count: int, rng: random.Random
) -> list[tuple[int, str]]:
    """What the model continues with a question, and which piece it is about."""
    if count <= 0:
        return []
    if kind == "paraphrase":
        facts = [question for question in known if question.kind == "fact"]
        chosen = [rng.choice(facts) for _ in range(count)] if facts else []
        return [(fact.chunk, f"Question: {fact.question}\nThe same in other words:\nQuestion:") for fact in chosen]
    pairs = [(index, sentence) for index, chunk in enumerate(chunks) for sentence in _sentences(chunk)]
    if not pairs:
        return []
    rng.shuffle(pairs)
    chosen_pairs = [pairs[index % len(pairs)] for index in range(count)]
    return [(chunk, f"{sentence}\nA question about this sentence:\nQuestion:") for chunk, sentence in chosen_pairs]


def _ask(
    teacher: Teacher, prompts: Sequence[tuple[int, str]], views: Sequence[Prefix], seed: str, batch_size: int
) -> list[str]:
    """What the model writes after each prompt, up to the end of the line."""
    if not prompts:
        return []
    config = GenerateConfig(
        max_new_tokens=48, temperature=0.9, top_p=0.95, seed=int(seed) % 2**31, stop=("\n",), batch_size=batch_size
    )
    backbone = teacher.backbone
    ids = [backbone.encode(prompt) for _, prompt in prompts]
    outputs = generate_ids(backbone, ids, [views[chunk] for chunk, _ in prompts], config=config)
    return [text_until_stop(backbone.decode, output, config.stop).strip() for output in outputs]


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
            texts = [*_SUMMARY, *(f"Summarize what the text says about {name}." for name in names)]
        else:
            texts = [template.format(name=name) for template in _LIST for name in names]
        found.extend(Question(text, None, index, kind) for text in texts)
    rng.shuffle(found)
    yield from found


def _continuations(index: int, chunk: str) -> Iterator[Question]:
    """The first words of each sentence, to be continued as the document does."""
    for sentence in _sentences(chunk):
        words = sentence.split()
        for share in (3, 2):
            cut = max(2, len(words) // share)
            yield Question(f"Continue the text: {' '.join(words[:cut])}", " ".join(words[cut:]), index, "continuation")


def answer_questions(
    teacher: Teacher,
    questions: Sequence[str],
    views: Sequence[Prefix | None],
    wording: Wording,
    *,
    answer_length: int,
    batch_size: int,
    on_batch: Progress = lambda done: None,
) -> list[str]:
    """What the teacher answers, greedily; empty where it says nothing.

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
    backbone: Backbone = teacher.backbone
    config = GenerateConfig(max_new_tokens=answer_length, stop=wording.stop, batch_size=batch_size)
    prompts = encode_prompts(backbone, wording.text_format, questions)
    outputs = generate_ids(backbone, prompts, views, config=config, on_batch=on_batch)
    return [read_output(backbone, ids, wording.text_format, config) for ids in outputs]
