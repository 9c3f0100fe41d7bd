"""Documents and questions from files, and documents in pieces that a model can have in view."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prefixtune.backbone.backbone import Backbone
from prefixtune.data.files import FORMATS, Record, iter_file
from prefixtune.data.streams import read_text
from prefixtune.errors import DataError, describe_value

__all__ = [
    "MAX_DOCUMENT_BYTES",
    "Question",
    "chunk_of_question",
    "find_documents",
    "questions_file",
    "read_questions",
    "split_document",
]

TEXT_ENDINGS = (".txt", ".md", ".rst", ".text")
MAX_DOCUMENT_BYTES = 2**24
"""Most bytes of a document or a prompt."""
_MOST_DOCUMENTS = 1000
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Question:
    """A question about a document, or another input.

    Attributes:
        question: As the model is asked.
        answer: None: the teacher is to write it.
        chunk: Which piece of the document it is about, counted from 0.
        kind: What it asks for, if it was made here; else `given`.
        about: The sentence or the name that it was made from; empty: it was given, or is about the whole.
        ended: The answer ends where the target does; False: it was cut at the most tokens of an answer.
    """

    question: str
    answer: str | None = None
    chunk: int = 0
    kind: str = "given"
    about: str = ""
    ended: bool = True


def find_documents(path: str) -> list[Path]:
    """The document at a path, or those in a folder, by name.

    Raises:
        DataError: There is none, two have one name, or there are too many.
    """
    root = Path(path)
    if not root.is_dir():
        return [root]
    files = sorted(file for file in root.iterdir() if file.suffix.lower() in TEXT_ENDINGS and file.is_file())
    if not files:
        raise DataError(
            f"the folder {path!r} has no document: no file that ends with {', '.join(TEXT_ENDINGS)}.",
            hint="name a file, or a folder with one text file per document.",
        )
    if len(files) > _MOST_DOCUMENTS:
        raise DataError(
            f"the folder {path!r} has {len(files):,} documents, but at most {_MOST_DOCUMENTS:,} are allowed.",
            hint="divide it into several folders.",
        )
    twice = [name for name, count in Counter(file.stem for file in files).items() if count > 1]
    if twice:
        raise DataError(
            f"the folder {path!r} has two documents of the name {twice[0]!r}.",
            hint="rename one: each memory gets a folder of its document's name.",
        )
    return files


def read_document(path: Path) -> str:
    """The text of a document.

    Raises:
        DataError: It is missing, empty, too large or not text.
    """
    return read_text(path, max_bytes=MAX_DOCUMENT_BYTES, needed="some words").strip()


def questions_file(path: str, document: Path, several: bool) -> Path:
    """The file with a document's questions: the one that is named, or in a folder the one of the document's name.

    Raises:
        DataError: The folder has no such file, or one file is given for several documents.
    """
    root = Path(path)
    if not root.is_dir():
        if several:
            raise DataError(
                f"{path!r} is one file, but there are several documents.",
                hint="name a folder with a file of questions per document, such as NAME.jsonl for NAME.txt.",
            )
        return root
    files = [root / f"{document.stem}{ending}{end}" for ending in FORMATS for end in ("", ".gz")]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise DataError(
            f"the folder {path!r} has no questions of {document.name!r}.",
            hint=f"write {document.stem}.jsonl with rows of question and answer.",
        )
    return found


def read_questions(path: Path) -> list[Question]:
    """The questions of a file; all of them have an answer, or none has.

    Args:
        path: Rows with `question` and perhaps `answer` or `answers`, which may be a list: the question is then there
            with each of them.

    Raises:
        DataError: The file cannot be read, or a row is wrong.
    """
    questions: list[Question] = []
    first: str | None = None
    for record in iter_file(path):
        question = _text(record.values, "question", record.location)
        if question is None:
            raise DataError(
                f"{record.location}: 'question' is missing; the columns are {', '.join(map(repr, record.values))}.",
                hint='write rows such as {"question": "...", "answer": "..."}.',
            )
        answers = _answers(record)
        answer = answers[0]
        if questions and (answer is None) != (questions[0].answer is None):
            one, other = ("has an", "has none") if answer is not None else ("has no", "has one")
            raise DataError(
                f"{record.location} {one} answer, but {first} {other}.",
                hint="give all questions an answer, or none: then the teacher writes them.",
            )
        first = first or record.location
        questions += [Question(question, one) for one in answers]
    return questions


def _answers(record: Record) -> list[str] | list[None]:
    """The answers of a row; [None]: it has none."""
    for column in ("answer", "answers"):
        value = record.values.get(column)
        texts = [
            _text({column: one}, column, record.location) for one in (value if isinstance(value, list) else [value])
        ]
        if given := [text for text in texts if text is not None]:
            return given
    return [None]


def _text(values: object, column: str, location: str) -> str | None:
    """The text of a column without outer white space; None: it is missing or empty."""
    value = values.get(column) if isinstance(values, dict) else None
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise DataError(f"{location}: {column!r} is {describe_value(value)}, not a text.", hint="write a text.")
    return value.strip() or None


# --- pieces ----------------------------------------------------------------------------------------------------------


def split_document(backbone: Backbone, text: str, length: int) -> list[str]:
    """A document in pieces of at most `length` tokens, cut at the ends of lines or sentences where there are some.

    Raises:
        DataError: A piece has no room for a single word.
    """
    if len(backbone.encode(text)) <= length:
        return [text]
    chunks: list[str] = []
    current: list[str] = []
    size = 0
    for part in _parts(backbone, text, length):
        count = len(backbone.encode(part))
        if current and size + count > length:
            chunks.append("".join(current).strip())
            current, size = [], 0
        current.append(part)
        size += count
    chunks.append("".join(current).strip())
    return [chunk for chunk in chunks if chunk]


def _parts(backbone: Backbone, text: str, length: int) -> list[str]:
    """Lines; sentences of a line that is too long; halves of a sentence that is too long."""
    parts: list[str] = []
    for line in text.splitlines(keepends=True):
        sentences = [line] if len(backbone.encode(line)) <= length else re.findall(r".+?(?:[.!?]\s+|$)", line, re.S)
        while sentences:
            sentence = sentences.pop(0)
            if len(backbone.encode(sentence)) <= length:
                parts.append(sentence)
            elif len(sentence) < 2:
                raise DataError(f"no text fits into {length} tokens.", hint="choose a longer --chunk-length.")
            else:
                half = len(sentence) // 2
                space = sentence.rfind(" ", 1, half)
                cut = space + 1 if space > 0 else half
                sentences[:0] = [sentence[:cut], sentence[cut:]]
    return parts


def chunk_of_question(chunks: Sequence[str], questions: Sequence[str]) -> list[int]:
    """Per question, the piece that shares most with it: words count by the logarithm of how few pieces have them.

    >>> chunk_of_question(["The owl flies.", "The fox runs."], ["Where is the fox?", "Who flies?"])
    [1, 0]
    """
    words = [{word.casefold() for word in _WORD.findall(chunk)} for chunk in chunks]
    counts = Counter(word for own in words for word in own)
    weight = {word: math.log(1 + len(chunks) / count) for word, count in counts.items()}
    chosen: list[int] = []
    for question in questions:
        asked = {word.casefold() for word in _WORD.findall(question)}
        scores = [sum(weight[word] for word in sorted(asked & own)) for own in words]
        chosen.append(max(range(len(chunks)), key=lambda index: scores[index]))
    return chosen
