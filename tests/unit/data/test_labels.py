"""Classification and tagging: a head, or the model's own words."""

import time

import pytest
import torch

import prefixtune as pt
from prefixtune.data import Example
from prefixtune.data.examples import Message
from prefixtune.data.forms import tagged
from prefixtune.data.labels import (
    check_labels,
    choose_labels,
    encode_labelled,
    encode_labelled_prompt,
    label_names,
    labels_of,
)
from prefixtune.errors import ConfigError, DataError, RequestError
from prefixtune.inference.classify import classify, tag
from prefixtune.prefix.text_format import TextFormat
from prefixtune.training.config import TrainConfig

# The label is whether the text holds a "q"; the tag, whether a word does.
TEXTS = ["abq", "cde", "qfg", "hij", "kql", "mno", "pqr", "stu"]
LABELLED = [Example(text, ("with" if "q" in text else "plain",)) for text in TEXTS]
TAGGED = [
    tagged(words, ["B-Q" if "q" in word else "O" for word in words])
    for words in (["ab", "qc"], ["q", "de", "fq"], ["gh", "ij"], ["kq", "l"])
]


@pytest.fixture
def options(tmp_path):
    return {
        "prefix_length": 4,
        "bottleneck_size": 16,
        "learning_rate": 3e-2,
        "batch_size": 8,
        "max_steps": 50,
        "warmup_steps": 5,
        "init_text": "letters",
        "output": str(tmp_path / "run"),
    }


# Slow: labels by a head and by words, each learned to the end.
@pytest.mark.parametrize(("family", "by"), [("bert", "head"), ("t5", "words")])
def test_a_prefix_learns_labels(family, by, tiny_backbone, options):
    backbone = tiny_backbone(family)
    options |= {"learning_rate": 3e-2 if by == "head" else 0.1}
    config = TrainConfig(**options, task="classification", classifier=by)
    result = pt.train(config, backbone=backbone, examples=LABELLED, dev_examples=LABELLED)
    loaded = pt.load_prefix(result.path, backbone)
    labels = labels_of(loaded)
    assert (labels.by, labels.names) == (by, ("plain", "with"))
    assert (loaded.head is not None) == (by == "head")
    scores = pt.evaluate(backbone, LABELLED, loaded).scores
    assert scores["accuracy"].score == 100
    assert scores["macro_f1"].score == 100


def test_a_prefix_learns_tags(tiny_backbone, options):
    backbone = tiny_backbone("llama")
    config = TrainConfig(**options, task="tagging")
    result = pt.train(config, backbone=backbone, examples=TAGGED)
    loaded = pt.load_prefix(result.path, backbone)
    assert pt.evaluate(backbone, TAGGED, loaded).scores["span_f1"].score == 100
    found = tag(backbone, [["ab", "qc"], ["zz"]], loaded)
    assert [token.label for token in found[0]] == ["O", "B-Q"]
    assert [len(row) for row in found] == [2, 1]
    with pytest.raises(ConfigError, match="never cut"):
        pt.evaluate(backbone, TAGGED, loaded, on_too_long="cut")
    for row in found:
        for token in row:
            assert set(token.probabilities) == {"O", "B-Q", "I-Q"}
            assert sum(token.probabilities.values()) == pytest.approx(1)


def test_the_words_probabilities_are_the_models_own(tiny_backbone):
    # Against the plainest way: each word after each text, alone, in full, summed over its tokens.
    backbone = tiny_backbone("llama")
    texts, words = ["abc", "d"], ["yes", "no", "maybe so"]
    made = classify(backbone, texts, labels=words, batch_size=2)
    form = TextFormat("{source}", " {target}")
    for text, found in zip(texts, made, strict=True):
        scores = []
        for word in words:
            prompt = backbone.encode(form.format_prompt(text, backbone.separator))
            answer = [*backbone.encode(form.format_target(word)), backbone.eos_id]
            with torch.no_grad():
                logits = backbone.model(input_ids=torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
            scores.append(sum(logits.log_softmax(-1)[n, token] for n, token in enumerate(answer)))
        wanted = torch.stack(scores).softmax(0).tolist()
        assert list(found.probabilities.values()) == pytest.approx(wanted, rel=1e-4)
        assert found.label == words[max(range(3), key=wanted.__getitem__)]


def test_a_word_is_tagged_at_its_own_tokens(tiny_backbone):
    # One token a byte: "ab qc" is a, b, space, q, c.
    examples = [tagged(["ab", "qc"], ["O", "B-Q"])]
    labels = choose_labels("tagging", tiny_backbone("bert"), examples)
    form = TextFormat("{source}", "{target}")
    bert, llama = tiny_backbone("bert"), tiny_backbone("llama")
    first = encode_labelled(bert, examples, labels, form, prefix_length=0).examples[0]
    begins = len(first.prompt) - 5 - (first.prompt[-1] == bert.tokenizer.eos_token_id)
    assert first.label_positions == (begins, begins + 3)
    last = encode_labelled(llama, examples, labels, form, prefix_length=0).examples[0]
    assert last.label_positions == (1, 4)
    assert first.targets == last.targets == ((0, 1),)


def test_the_work_for_a_text_grows_with_its_words(tiny_backbone):
    """By each word's own look at all tokens, it would take minutes."""
    llama, form = tiny_backbone("llama"), TextFormat("{source}", "{target}")
    words = ["a", "bcd", "ef"] * 20_000
    began = time.monotonic()
    ids, positions = encode_labelled_prompt(llama, form, " ".join(words), words)
    assert time.monotonic() - began < 10
    # One token a character; a word's last one counts.
    ends, end = [], 0
    for word in words:
        ends.append(end + len(word) - 1)
        end += len(word) + 1
    assert (positions, len(ids)) == (ends, end - 1)


def test_a_long_text_is_truncated_and_counted(tiny_backbone):
    backbone = tiny_backbone("llama")
    examples = [tagged(["abc"] * 20, ["O"] * 20), tagged(["q"], ["B-Q"])]
    labels = choose_labels("tagging", backbone, examples)
    form = TextFormat("{source}", "{target}")
    made = encode_labelled(backbone, examples, labels, form, prefix_length=4, max_length=11)
    assert made.num_truncated == 1
    assert made.examples[0].label_positions == (2, 6, 10)
    assert len(made.examples[0].targets[0]) == 3
    with pytest.raises(DataError):
        encode_labelled(backbone, examples, labels, form, prefix_length=4, max_length=11, on_too_long="error")
    with pytest.raises(DataError, match="example 2"):
        encode_labelled(
            backbone, [examples[1], tagged(["a" * 20], ["O"])], labels, form, prefix_length=4, max_length=11
        )


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_what_a_backbone_cannot_do_is_refused(tiny_backbone, options):
    for family, data, by in (("bert", LABELLED, "words"), ("t5", LABELLED, "head"), ("llama", TAGGED, "words")):
        with pytest.raises(ConfigError):
            choose_labels("tagging" if data is TAGGED else "classification", tiny_backbone(family), data, by=by)
    with pytest.raises(ConfigError):
        pt.train(TrainConfig(**options), backbone=tiny_backbone("bert"), examples=LABELLED)


def test_wrong_labels_and_words_are_reported(tiny_backbone):
    backbone = tiny_backbone("llama")
    for words, said in (({"wiht": "yes"}, "'wiht'"), ({"with": "yes", "plain": "yes"}, "yes, yes")):
        with pytest.raises(ConfigError, match=said):
            choose_labels("classification", backbone, LABELLED, words=words)
    for train, dev in ((LABELLED[:1], []), (LABELLED, [Example("x", ("other",))])):
        with pytest.raises(DataError):
            choose_labels("classification", backbone, train, dev)
    with pytest.raises(ConfigError):
        choose_labels("classification", tiny_backbone("bert"), LABELLED, words={"with": "yes"})
    chat = Example("q", ("with",), messages=(Message("system", "Say it."), Message("user", "q")))
    with pytest.raises(DataError, match="example 9"):
        choose_labels("classification", backbone, [*LABELLED, chat])


def test_a_prefix_is_used_for_what_it_was_trained_for(tiny_backbone, random_prefix):
    backbone = tiny_backbone("llama")
    generating = random_prefix(backbone, 3)
    for call in (
        lambda: classify(backbone, ["a"], generating),
        lambda: classify(backbone, ["a"]),
        lambda: tag(backbone, [["a"]], generating),
    ):
        with pytest.raises(ConfigError):
            call()
    for texts in ("abc", ["a" * 500]):
        with pytest.raises(RequestError):
            classify(backbone, texts, labels=["x", "y"])


# --- names -----------------------------------------------------------------------------------------------------------


def labelled(*labels):
    return [Example(f"text {number}", (label,)) for number, label in enumerate(labels)]


def test_the_names_of_tags_are_whole_pairs_after_o():
    examples = [tagged(["a", "b"], ["B-Y", "O"]), tagged(["a"], ["I-X-2"])]
    assert label_names(iter(examples), "tagging") == ("O", "B-X-2", "I-X-2", "B-Y", "I-Y")


@pytest.mark.parametrize("examples", [[], labelled("a", "a"), [*labelled("a", "b"), Example("x", ("a", "b"))]])
def test_one_label_is_no_classification(examples):
    with pytest.raises(DataError):
        label_names(examples)


def test_an_unknown_label_is_named_with_its_example_and_the_nearest_known_one():
    names = label_names([tagged(["a"], ["B-STATION"])], "tagging")
    check_labels([tagged(["a", "b"], ["B-STATION", "I-STATION"])], names, "tagging")
    with pytest.raises(DataError, match=r"'B-STATIN' of example 2 .*'B-STATION'"):
        check_labels([tagged(["a"], ["O"]), tagged(["b"], ["B-STATIN"])], names, "tagging")
    with pytest.raises(DataError, match=r"'bda' of example 1 .*'bad'"):
        check_labels(labelled("bda"), ["bad", "good"])
