"""Teachers and their labels."""

import copy
import dataclasses

import pytest
import torch

from prefixtune.backbone.batch import SoftLabels
from prefixtune.distillation.inputs import Question
from prefixtune.distillation.reader import Reader
from prefixtune.distillation.teacher import Teacher, check_same_tokens, label_examples, read_labels, write_labels
from prefixtune.distillation.wording import Wording, encode_questions
from prefixtune.errors import BackboneError, CheckpointError

WORDING = Wording("Question: {source}\nAnswer:", " {target}\n")
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


def test_a_teacher_with_other_tokens_or_of_another_kind_is_refused(backbone, tiny_backbone):
    tokenizer = copy.deepcopy(backbone.tokenizer)
    tokenizer.add_tokens(["owl"])
    for teacher in (dataclasses.replace(backbone, tokenizer=tokenizer), tiny_backbone("bart")):
        with pytest.raises(BackboneError):
            check_same_tokens(backbone, teacher)
