"""Questions that are made from a document (`--questions self`)."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from prefixtune.backbone.backbone import Backbone
from prefixtune.distillation.config import KINDS, QuestionKind
from prefixtune.distillation.inputs import Question
from prefixtune.distillation.reader import Progress, Reader
from prefixtune.errors import DataError
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import complete
from prefixtune.inference.prompts import Prompt, check_requests

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


def make_questions(
    teacher: Reader, chunks: Sequence[str], count: int, kinds: Sequence[QuestionKind], seed: int, on_batch: Progress
) -> list[Question]:
    """Questions about a document, no two alike, the same for the same seed.

    `fact`: the model asks about a sentence; `paraphrase`: it asks such a question in other words; `list` and `summary`:
    templates, about the names in the text and about the whole; `continuation`: a sentence is to be completed, and the
    document itself is the answer.

    Args:
        teacher: Who makes them, with the pieces in view.
        chunks: The document's pieces.
        count: Questions to make; fewer where the text gives no more.
        kinds: What they ask for, in equal shares; paraphrases only together with facts.
        seed: Of all choices.
        on_batch: Called with the number of questions so far.

    Raises:
        DataError: There is no question.
    """
    rng = random.Random(f"{seed}/questions")
    made: dict[str, Question] = {}
    # Facts come before their paraphrases, in whatever order they are named.
    ordered = [kind for kind in KINDS if kind in kinds]
    for number, kind in enumerate(ordered):
        wanted = len(made) + count * (number + 1) // len(ordered) - count * number // len(ordered)
        by_model = kind in ("fact", "paraphrase")
        for attempt in range(_ROUNDS if by_model else 1):
            if by_model:
                prompts = _prompts(kind, chunks, list(made.values()), wanted - len(made), rng)
                texts = _ask(teacher, prompts, int(f"{seed}{number}{attempt}") % 2**31)
                found = [
                    Question(_first_question(text), None, chunk, kind, about)
                    for (chunk, about, _), text in zip(prompts, texts, strict=True)
                ]
            else:
                found = _templates(kind, chunks, rng)
            for question in found:
                key = " ".join(question.question.casefold().split())
                if len(made) < wanted and 3 <= len(key) <= _MOST_CHARS and any(letter.isalpha() for letter in key):
                    made.setdefault(key, question)
            on_batch(len(made))
    if not made:
        raise DataError("no question was made of the document.", hint="give a longer text, or write --questions FILE.")
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


def asking_tokens(backbone: Backbone, text: str) -> int:
    """The most tokens behind a text in view while questions are made of it: of a sentence, and of a question about it.

    Args:
        backbone: Whose tokens are counted.
        text: The whole document.
    """
    parts = (part.strip()[: 2 * _MOST_CHARS] for part in _SENTENCE.split(text))
    return max(len(backbone.encode(part)) for part in parts) + 2 * _QUESTION_TOKENS


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
    rng.shuffle(pairs)
    chosen_pairs = [pairs[index % len(pairs)] for index in range(count if pairs else 0)]
    return [(chunk, sentence, f"{sentence}{_ABOUT_SENTENCE}") for chunk, sentence in chosen_pairs]


def _ask(teacher: Reader, prompts: Sequence[tuple[int, str, str]], seed: int) -> list[str]:
    """What the model writes after each prompt, up to the end of the line."""
    if not prompts:
        return []
    size = teacher.batch_size
    config = GenerateConfig(
        max_new_tokens=_QUESTION_TOKENS, temperature=0.9, top_p=0.95, seed=seed, stop=("\n",), batch_size=size
    )
    backbone = teacher.backbone
    asked = [Prompt(backbone.encode(text), teacher.views[chunk], _QUESTION_TOKENS) for chunk, _, text in prompts]
    check_requests(backbone, asked)
    return [output.text for _, output in sorted(complete(backbone, asked, config), key=lambda one: one[0])]


def _first_question(text: str) -> str:
    """The first question in what a model wrote; empty: there is none.

    >>> _first_question("Who drives the Owl? Answer: Mira"), _first_question("The Owl.")
    ('Who drives the Owl?', '')
    """
    return text[: text.index("?") + 1].strip() if "?" in text else ""


def _templates(kind: QuestionKind, chunks: Sequence[str], rng: random.Random) -> list[Question]:
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
    return found


def _continuations(index: int, chunk: str) -> Iterator[Question]:
    """The first words of each sentence, to be continued as the document does."""
    for sentence in _sentences(chunk):
        words = sentence.split()
        for share in (3, 2):
            cut = max(2, len(words) // share)
            asked, answer = f"Continue the text: {' '.join(words[:cut])}", " ".join(words[cut:])
            yield Question(asked, answer, index, "continuation", sentence)
