"""What counts for a reader: ends of targets, answers of several lines, cut ones; teachers and their labels."""

import copy
import dataclasses
import itertools

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

import prefixtune.distillation.questions as questions_module
from prefixtune.backbone.batch import SoftLabels
from prefixtune.distillation.inputs import Question
from prefixtune.distillation.questions import hold_out, make_questions
from prefixtune.distillation.reader import Reader
from prefixtune.distillation.teacher import Teacher, check_same_tokens, label_examples, read_labels, write_labels
from prefixtune.distillation.wording import Wording, count_endings, encode_questions, without_ends
from prefixtune.engine.model_runner import ModelRunner
from prefixtune.errors import BackboneError, CheckpointError, RequestError

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


ASKED = [Question("Where?", "Ashby", 1), Question("Owl?", "Dover, far", 0), Question("Fox?", "B", 1)]


def labelled(reader, questions):
    examples = encode_questions(reader.backbone, questions, reader.wording, 0)
    return label_examples(reader, examples, questions, 105)


def test_labels_are_those_of_the_whole_text_through_the_plain_model(backbone):
    texts = ["The Owl goes to Ashby.", "The Fox goes to Dover."]
    made = labelled(Teacher(backbone, "teacher").reader(WORDING, texts, 2), ASKED)
    for question, one in zip(ASKED, made, strict=True):
        text = backbone.encode(WORDING.view(backbone, texts[question.chunk]))
        (own,), (target,) = one.soft_targets, one.targets
        ids = torch.tensor([[*text, *one.prompt, *target]])
        with torch.no_grad():
            logits = backbone.model(ids).logits[0, len(text) + len(one.prompt) - 1 : -1]
        wanted = SoftLabels.from_logits(logits)
        count = len(target) - 2
        torch.testing.assert_close(own.log_probs[:count], wanted.log_probs[:count], rtol=1e-3, atol=1e-3)
        # The line break and the end token are certain.
        assert own.ids[count:, 0].tolist() == list(target[count:])
        assert own.log_probs[count:, 0].tolist() == [0.0, 0.0]


def test_a_teacher_with_more_logits_is_read_in_the_students_vocabulary(tiny_backbone):
    larger = tiny_backbone("llama", vocab_size=128, max_position_embeddings=512)
    tuned = dataclasses.replace(WORDING, tuned=True)
    (made,) = labelled(Reader(larger, tuned, [None], 2), [Question("Who?", "Mira")])
    (labels,) = made.soft_targets
    assert int(labels.ids.max()) < 105
    torch.testing.assert_close(labels.log_probs.exp().sum(dim=1), torch.ones(len(labels)))
    # It was trained with this wording, and says itself where an answer ends.
    assert labels.log_probs[-1, 0] < 0


def test_kept_labels_come_back_and_damage_is_refused(backbone, tmp_path):
    asked, path = [Question("Who?", "Mira"), Question("When?", "At 8:00")], tmp_path / "teacher.safetensors"
    made = labelled(Reader(backbone, WORDING, [None], 2), asked)
    write_labels(path, made)
    back = read_labels(path, encode_questions(backbone, asked, WORDING, 0))
    for one, own in zip(back, made, strict=True):
        assert torch.equal(one.soft_targets[0].ids, own.soft_targets[0].ids)
        assert torch.equal(one.soft_targets[0].log_probs, own.soft_targets[0].log_probs)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        read_labels(path, made)


def test_a_teacher_whose_numbers_are_not_finite_is_refused(tiny_backbone):
    broken = tiny_backbone("llama", max_position_embeddings=512, num_hidden_layers=1)
    with torch.no_grad():
        broken.model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(BackboneError, match="not finite"):
        labelled(Reader(broken, WORDING, [None], 1), [Question("Who?", "Mira")])


def test_a_question_that_the_teacher_cannot_read_is_refused(backbone, tiny_backbone):
    short = Reader(tiny_backbone("llama", max_position_embeddings=8), WORDING, [None], 1)
    with pytest.raises(RequestError):
        label_examples(
            short, encode_questions(backbone, ASKED[:1], WORDING, 0), [dataclasses.replace(ASKED[0], chunk=0)], 105
        )


def test_a_teacher_with_other_tokens_or_of_another_kind_is_refused(backbone, tiny_backbone):
    tokenizer = copy.deepcopy(backbone.tokenizer)
    tokenizer.add_tokens(["owl"])
    for teacher in (dataclasses.replace(backbone, tokenizer=tokenizer), tiny_backbone("bart")):
        with pytest.raises(BackboneError):
            check_same_tokens(backbone, teacher)


def test_many_questions_about_a_long_text_are_answered_at_once(tiny_backbone, random_prefix, monkeypatch):
    """What is in view stands in the engine's pool once: it does not count for every question."""
    backbone = tiny_backbone("llama", max_position_embeddings=4000)
    view = random_prefix(backbone, 1500, 1).detach()
    reader = Reader(backbone, WORDING, [view], 16)
    assert reader.rows < 16
    together = []
    forward = ModelRunner.forward

    def watch(self, scheduled):
        together.append(len(scheduled))
        return forward(self, scheduled)

    monkeypatch.setattr(ModelRunner, "forward", watch)
    asked = [Question(f"Where is {number}?") for number in range(16)]
    answered = reader.answer(asked, 12, lambda done: None)
    assert max(together) == 16
    for question, both in list(zip(asked, answered, strict=True))[:3]:
        assert reader.answer([question], 12, lambda done: None) == [both]
