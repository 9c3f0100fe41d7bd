"""What counts in the report: the tokens that end a target, answers of several lines, answers that were cut."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

import prefixtune.distillation.questioning as questioning
import prefixtune.distillation.report as module
from prefixtune.backbone.backbone import Backbone
from prefixtune.distillation.config import QuestionKind
from prefixtune.distillation.documents import Question
from prefixtune.distillation.questioning import answer_questions, hold_out, make_questions
from prefixtune.distillation.report import closing_tokens, encode_taught, read_test
from prefixtune.distillation.teacher import Teacher
from prefixtune.distillation.wording import Wording

WORDING = Wording("Question: {source}\nAnswer:", " {target}\n")


def with_llama_2_tokenizer(backbone: Backbone) -> Backbone:
    """With a tokenizer that puts a mark in front of every text, and writes a line break as one byte."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{i:02X}>": 3 + i for i in range(256)}}
    vocabulary |= {token: 259 + index for index, token in enumerate("\u2581Ashby")}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    return dataclasses.replace(backbone, tokenizer=made)


@pytest.mark.parametrize(("target", "count"), [(" {target}\n", 2), ("{target}", 1), (" {target} !", 3)])
def test_the_end_of_a_target_is_counted_in_it(backbone: Backbone, target: str, count: int) -> None:
    wording = Wording("{source}", target)
    assert closing_tokens(backbone, wording, ["Ashby", "B."]) == [count, count]
    if target != " {target} !":
        assert closing_tokens(with_llama_2_tokenizer(backbone), wording, ["Ashby"]) == [count]


def test_an_answer_that_was_cut_has_no_end(backbone: Backbone) -> None:
    whole, cut = encode_taught(
        backbone, [Question("Where?", "Ashby", ended=ended) for ended in (True, False)], WORDING, 4
    )
    assert whole.targets[0][-1] == backbone.eos_id
    assert cut.targets[0] == whole.targets[0][:-2]
    # The tiny model writes no end within so few tokens.
    ((_, ended),) = answer_questions(
        Teacher(backbone, "t"), ["Where?"], [None], Wording("{source}", "{target}"), answer_length=3, batch_size=2
    )
    assert not ended


def test_answers_of_several_lines_can_be_exact(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    written = {"List?": "Ashby\nDover\nmore", "Where?": "Ashby\nmore", "Who?": "Mira"}
    stops: dict[str, tuple[str, ...]] = {}

    def answer(_: Any, questions: list[str], *args: Any, **options: Any) -> list[tuple[str, bool]]:
        stops.update(dict.fromkeys(questions, args[1].stop))
        return [(written[question], True) for question in questions]

    monkeypatch.setattr(module, "answer_questions", answer)
    test = [Question("List?", "Ashby\nDover"), Question("Where?", "Ashby"), Question("Who?", "Nina")]
    reading = read_test(Teacher(backbone, "t"), test, [], [None] * 3, [], WORDING, batch_size=2)
    assert reading.exact == 2
    assert stops == {"List?": ("\nQuestion:",), "Where?": ("\n",), "Who?": ("\n",)}


def test_of_several_answers_to_a_question_any_is_right(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    done: list[int] = []

    def answer(_: Any, questions: list[str], *__: Any, on_batch: Any, **___: Any) -> list[tuple[str, bool]]:
        asked.extend(questions)
        on_batch(len(questions))
        return [("Mira\nStone", True)] * len(questions)

    monkeypatch.setattr(module, "answer_questions", answer)
    test = [Question("Who?", one) for one in ("Nina", "Mira", "Mira\nMoon")] + [Question("Where?", "Ashby")]
    reading = read_test(Teacher(backbone, "t"), test, [], [None] * 4, [], WORDING, batch_size=2, on_batch=done.append)
    assert reading.exact == 1
    # Each is answered once.
    assert sorted(asked) == ["Where?", "Who?"]
    assert done == [1, 2]


def make(kinds: tuple[QuestionKind, ...], count: int, backbone: Backbone) -> list[Question]:
    chunks = ["The Owl goes to Ashby. The Fox goes to Dover."]
    teacher = Teacher(backbone, "t")
    return make_questions(teacher, chunks, [], count=count, kinds=kinds, seed=1, batch_size=2, on_batch=lambda _: None)


def test_paraphrases_are_made_of_facts_in_whatever_order_they_are_named(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = itertools.count()
    monkeypatch.setattr(questioning, "_ask", lambda _, prompts, *__: [f"Who is {next(numbers)}?" for _ in prompts])
    one, other = make(("paraphrase", "fact"), 6, backbone), make(("fact", "paraphrase"), 6, backbone)
    assert (
        [question.kind for question in one]
        == [question.kind for question in other]
        == ["fact"] * 3 + ["paraphrase"] * 3
    )


def test_held_out_questions_share_no_sentence_and_no_name_with_the_others() -> None:
    questions = [
        Question(f"{kind} {about}?", None, 0, "fact", about)
        for about in "abcdefghij"
        for kind in ("who", "where", "why")
    ]
    whole = Question("Summarize the text.", None, 0, "summary")
    kept, held_out = hold_out([*questions, whole], seed=1)
    assert len(held_out) == 3
    assert whole in kept
    assert not {question.about for question in kept} & {question.about for question in held_out}
    assert sorted([*kept, *held_out], key=str) == sorted([*questions, whole], key=str)
    assert hold_out(questions[:9], seed=1) == (questions[:9], [])
