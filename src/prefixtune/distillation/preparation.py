"""The phases of a memory before its training: a plan, questions with answers, and the teacher's labels."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.distillation.config import KINDS, SELF, DistillConfig
from prefixtune.distillation.inputs import Job, Question, num_asked
from prefixtune.distillation.memory import START_FILE, Memory, check_student, plan_memory, with_chunks
from prefixtune.distillation.questions import hold_out, make_questions
from prefixtune.distillation.reader import Reader
from prefixtune.distillation.teacher import (
    LABELS_FILE,
    Teacher,
    label_examples,
    load_teacher,
    read_labels,
    teacher_files,
    write_labels,
)
from prefixtune.distillation.wording import check_view, choose_wording, encode_questions, without_ends
from prefixtune.errors import CheckpointError, DataError
from prefixtune.prefix.compose import MAX_QUESTIONS
from prefixtune.training.config import TrainConfig
from prefixtune.training.data import TrainData
from prefixtune.utils.console import Console, Progress
from prefixtune.utils.files import atomic_path, write_text

_QUESTIONS_FILE = "questions.jsonl"
_DECISIVE = (
    *("teacher", "ask", "prompt_format", "target_format", "answer_length", "chunk_length", "num_questions", "kinds"),
    "seed",
)
"""Options that decide what a teacher makes."""


_MOST_CHARACTERS = 400
"""Of a question with its answer that is stored with a memory."""


class Preparation:
    """Memories before their training, and the teacher of all of them, who is let go when the last one is labelled.

    Args:
        config: The options.
        jobs: What the memories are made of; all are checked before anything is written.
        student: The backbone.
        console: Shows the progress; what it raises ends the work, and what is complete by then is kept.

    Attributes:
        memories: In the jobs' order.

    Raises:
        BackboneError: The teacher has another tokenizer.
        ConfigError: The backbone or the teacher cannot do the job.
        DataError: A text is shorter than its memory, or does not fit.
    """

    def __init__(self, config: DistillConfig, jobs: Sequence[Job], student: Backbone, console: Console) -> None:
        check_student(config, student, jobs)
        self._config, self._student, self._console = config, student, console
        if config.teacher:
            console.info(f"loading the teacher {config.teacher} ...")
        self._teacher = teacher = load_teacher(config, student)
        readers = [student] if teacher.backbone is student else [student, teacher.backbone]
        for reader in readers if config.subject != "teacher" else ():
            check_view(reader)
        wording = choose_wording(config, student, teacher.text_format)
        self.memories = [plan_memory(config, job, readers, wording) for job in jobs]
        self._unlabelled = {memory.run.output: memory for memory in self.memories}

    # --- questions with answers ---

    def make_questions(self, memory: Memory) -> None:
        """Make a memory's questions and answers, unless its folder keeps them.

        Raises:
            CheckpointError: The run began with another text, they were made from something else, or a file is damaged.
            DataError: No question could be made, or the teacher answers none.
        """
        folder = memory.job.output
        if memory.job.text:
            view = memory.wording.view(self._student, memory.job.text)
            stage(folder / START_FILE, view, lambda temporary: write_text(temporary, view))
        if not memory.soft:
            memory.questions = with_chunks(memory.job.questions, memory.chunks)
            return
        path, sources = folder / _QUESTIONS_FILE, sources_of(self._config, memory.job, self._student)
        memory.sources = stage(path, sources, lambda temporary: write_questions(temporary, *self._make(memory)))
        memory.questions, memory.taught = read_questions(path)
        if self._teacher.backbone is not self._student or self._teacher.prefix is not None:
            with self._console.progress("the teacher's answers", num_asked(memory.test)) as bar:
                memory.reading = self._reader(memory).read(memory.test, bar.update)

    def _make(self, memory: Memory) -> tuple[list[Question], list[Question]]:
        """Questions to train on and held-out ones, all with answers: given ones, or the teacher's."""
        teacher = self._reader(memory)
        # One that has several answers is there with each; the teacher is asked once.
        held_out = list(dict.fromkeys(replace(question, answer=None) for question in memory.test))
        if self._config.questions == SELF:
            questions = self._ask(memory, teacher)
            if not held_out:
                questions, held_out = hold_out(questions, self._config.seed)
        else:
            questions = with_chunks(memory.job.questions, memory.chunks)
        asked = [*questions, *held_out]
        missing = [question for question in asked if question.answer is None]
        with self._timed(memory, "answers", len(missing)) as bar:
            written = iter(teacher.answer(missing, self._config.answer_length, bar.update))
        answered = [question if question.answer is not None else next(written) for question in asked]
        made = [question for question in answered[: len(questions)] if question.answer]
        if not made:
            raise DataError(
                f"the teacher {self._teacher.name!r} answers no question{memory.title} with a word.",
                hint="give answers, another --teacher, or --ask chat.",
            )
        if left_out := len(questions) - len(made):
            self._console.info(f"{left_out} of {len(questions)} questions{memory.title} got no answer and are left out")
        if cut := sum(not question.ended for question in made):
            length = f"{self._config.answer_length} tokens (--answer-length)"
            self._console.info(f"{cut} of {len(made)} answers{memory.title} are cut at {length}, and teach no end")
        return made, [question for question in answered[len(questions) :] if question.answer]

    def _ask(self, memory: Memory, teacher: Reader) -> list[Question]:
        """Questions that the teacher makes of the document."""
        wanted, kinds, seed = self._config.num_questions, self._config.kinds, self._config.seed
        with self._timed(memory, "questions", wanted) as bar:
            made = make_questions(teacher, memory.chunks, wanted, kinds, seed, bar.update)
        if len(made) < wanted:
            counts = Counter(question.kind for question in made)
            by_kind = ", ".join(f"{kind} {counts[kind]}" for kind in KINDS if kind in kinds)
            self._console.info(f"{len(made)} of {wanted} questions{memory.title} were made ({by_kind})")
        return made

    def _reader(self, memory: Memory) -> Reader:
        return self._teacher.reader(memory.wording, memory.chunks, self._config.batch_size)

    @contextlib.contextmanager
    def _timed(self, memory: Memory, phase: str, total: int) -> Iterator[Progress]:
        """Show the progress of a phase, and keep what it took."""
        started = time.monotonic()
        with self._console.progress(f"{phase}{memory.title}", total) as bar:
            yield bar
        memory.seconds[phase] = time.monotonic() - started

    # --- labels ---

    def label(self, run: TrainConfig, backbone: Backbone, data: TrainData) -> TrainData:
        """A run's data with the teacher's labels, unless the answers are the labels; made once, and kept.

        Args:
            run: The training of one of the memories, each of which is labelled once.
            backbone: The student.
            data: The memory's questions with answers, as tokens.

        Raises:
            BackboneError: The teacher's numbers are not finite.
            CheckpointError: The labels were made from something else, or their file is damaged.
        """
        memory = self._unlabelled.pop(run.output)
        if memory.soft:
            data = self._with_labels(memory, data)
        if self._config.subject == "document":
            data = replace(data, questions=_stored(memory.questions))
        if not self._unlabelled:
            self._teacher = Teacher(self._student, self._student.name)
        return data

    def _with_labels(self, memory: Memory, data: TrainData) -> TrainData:
        path, count = memory.job.output / LABELS_FILE, len(memory.questions)
        questions = [*memory.questions, *memory.taught]
        taught = encode_questions(self._student, memory.taught, memory.wording, data.prefix_length)
        whole = [*data.train.examples, *taught]
        examples = without_ends(self._student, whole, questions, memory.wording, ended=False)
        vocabulary = int(self._student.model.get_output_embeddings().weight.shape[0])

        def make(temporary: Path) -> None:
            with self._timed(memory, "labels", len(questions)) as bar:
                labelled = label_examples(self._reader(memory), examples, questions, vocabulary, bar.update)
            write_labels(temporary, labelled)

        inputs = [memory.sources, data.digest, [asdict(question) for question in memory.taught]]
        digest = stage(path, inputs, make)
        labelled = read_labels(path, examples)
        memory.labelled = labelled[count:]
        return replace(data, train=replace(data.train, examples=tuple(labelled[:count])), digest=digest)


def _stored(questions: Sequence[Question]) -> list[tuple[str, str]]:
    """Some questions with their answers, none of them long, to be stored with a memory."""
    pairs = [(one.question, one.answer or "") for one in questions]
    short = [pair for pair in dict.fromkeys(pairs) if sum(map(len, pair)) <= _MOST_CHARACTERS]
    return short[:: -(-len(short) // MAX_QUESTIONS) or 1]


def sources_of(config: DistillConfig, job: Job, student: Backbone) -> list[Any]:
    """What tells a teacher's questions and answers from any other."""
    settings = [config.questions == SELF, *(getattr(config, name) for name in _DECISIVE)]
    settings += student.fingerprint, student.dtype_name
    asked = [[question.question, question.answer] for question in (*job.questions, *job.test)]
    return [settings, job.text, asked, len(job.questions), teacher_files(config.teacher)]


def stage(path: Path, inputs: Any, make: Callable[[Path], None]) -> str:
    """Make a file, unless it is there and was made from these inputs; returns their hash.

    Args:
        path: The file; the hash of its inputs is beside it, in a file with `.made_from` behind its name. It is written
            first: a file without one is somebody's own, and is left as it is.
        inputs: All that decides the result, as JSON.
        make: Writes the file to the path that it gets.

    Raises:
        CheckpointError: The file was made from other inputs.
    """
    key = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
    note = path.with_name(f"{path.name}.made_from")
    if path.exists():
        if not note.exists() or note.read_text(encoding="utf-8") != key:
            raise CheckpointError(f"{str(path)!r} was made from other inputs.", hint="give those, or another --output.")
        return key
    write_text(note, key)
    with atomic_path(path) as temporary:
        make(temporary)
    return key


def write_questions(path: Path, questions: Sequence[Question], taught: Sequence[Question]) -> None:
    """Write questions to train on, and behind them held-out ones, as JSON lines."""
    parts = ((False, questions), (True, taught))
    rows = [{**asdict(question), "held_out": held} for held, part in parts for question in part]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_questions(path: Path) -> tuple[list[Question], list[Question]]:
    """The questions to train on that a run's folder keeps, and the held-out ones.

    Raises:
        CheckpointError: The file is damaged.
    """
    parts: tuple[list[Question], list[Question]] = ([], [])
    try:
        # JSON escapes line feeds, but not the other ends of lines that `splitlines` knows.
        for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n"):
            row: dict[str, Any] = json.loads(line)
            parts[bool(row.pop("held_out"))].append(Question(**row))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{str(path)!r} does not hold the questions of a run.", hint="delete it: they are made again."
        ) from error
    return parts
