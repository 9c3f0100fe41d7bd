"""What counts for a reader: the tokens that end a target, answers of several lines, answers that were cut."""

import dataclasses
import itertools

import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

import prefixtune.distillation.questions as questions_module
from prefixtune.distillation.inputs import Question
from prefixtune.distillation.questions import hold_out, make_questions
from prefixtune.distillation.reader import Reader
from prefixtune.distillation.wording import Wording, count_endings, encode_questions, without_ends

WORDING = Wording("Question: {source}\nAnswer:", " {target}\n")


def with_llama_2_tokenizer(backbone):
    """With a tokenizer that puts a mark in front of every text, and writes a line break as one byte."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{i:02X}>": 3 + i for i in range(256)}}
    vocabulary |= {token: 259 + index for index, token in enumerate("\u2581Ashby")}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    return dataclasses.replace(backbone, tokenizer=made)


@pytest.mark.parametrize(("target", "count"), [(" {target}\n", 2), ("{target}", 1), (" {target} !", 3)])
def test_the_end_of_a_target_is_counted_in_it(backbone, target, count):
    wording, asked = Wording("{source}", target), [Question("", "Ashby"), Question("", "B.")]
    assert count_endings(backbone, asked, wording) == [count, count]
    if target != " {target} !":
        assert count_endings(with_llama_2_tokenizer(backbone), asked[:1], wording) == [count]


def test_an_answer_that_was_cut_has_no_end(backbone):
    asked = [Question("Where?", "Ashby", ended=ended) for ended in (True, False)]
    whole, cut = without_ends(backbone, encode_questions(backbone, asked, WORDING, 4), asked, WORDING, ended=False)
    assert whole.targets[0][-1] == backbone.eos_id
    assert cut.targets[0] == whole.targets[0][:-2]
    # The tiny model writes no end within so few tokens.
    (answered,) = Reader(backbone, Wording("{source}", "{target}"), [None], 2).answer([Question("Where?")], 3, print)
    assert not answered.ended


def written(monkeypatch, answers):
    """Let readers answer so; returns what they are asked, with what ends an answer."""
    asked = []

    def answer(self, questions, length, on_batch):
        asked.extend((question.question, self.wording.stop) for question in questions)
        on_batch(len(questions))
        return [dataclasses.replace(question, answer=answers[question.question]) for question in questions]

    monkeypatch.setattr(Reader, "answer", answer)
    return asked


def test_answers_of_several_lines_can_be_exact(backbone, monkeypatch):
    asked = written(monkeypatch, {"List?": "Ashby\nDover\nmore", "Where?": "Ashby\nmore", "Who?": "Mira"})
    test = [Question("List?", "Ashby\nDover"), Question("Where?", "Ashby"), Question("Who?", "Nina")]
    reader = Reader(backbone, WORDING, [None], 2)
    assert reader.read(test)["exact"] == 2
    assert {stop for _, stop in asked} == {("\nQuestion:",)}
    asked.clear()
    assert reader.read(test[1:])["exact"] == 1
    assert {stop for _, stop in asked} == {("\n",)}


def test_of_several_answers_to_a_question_any_is_right(backbone, monkeypatch):
    asked = written(monkeypatch, dict.fromkeys(("Who?", "Where?"), "Mira\nStone"))
    test = [Question("Who?", one) for one in ("Nina", "Mira", "Mira\nMoon")] + [Question("Where?", "Ashby")]
    assert Reader(backbone, WORDING, [None], 2).read(test)["exact"] == 1
    # Each is answered once.
    assert [question for question, _ in asked] == ["Who?", "Where?"]


def make(kinds, count, backbone):
    chunks = ["The Owl goes to Ashby. The Fox goes to Dover."]
    return make_questions(Reader(backbone, WORDING, [None], 2), chunks, count, kinds, 1, lambda done: None)


def test_paraphrases_are_made_of_facts_in_whatever_order_they_are_named(backbone, monkeypatch):
    numbers = itertools.count()
    monkeypatch.setattr(questions_module, "_ask", lambda _, prompts, *__: [f"Who is {next(numbers)}?" for _ in prompts])
    made = [make(kinds, 6, backbone) for kinds in (("paraphrase", "fact"), ("fact", "paraphrase"))]
    for questions in made:
        assert [question.kind for question in questions] == ["fact"] * 3 + ["paraphrase"] * 3


def test_held_out_questions_share_no_sentence_and_no_name_with_the_others():
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
