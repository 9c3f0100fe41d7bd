"""What is scored, by groups too, what is kept of a stopped one, the folder that it writes; perplexity of texts."""

import copy
import dataclasses
import json
import math
from dataclasses import replace

import pytest
import torch

from patching import replace_everywhere
from prefixtune.data import Example
from prefixtune.data.encoding import TEXT_FORMAT
from prefixtune.data.labels import Labels
from prefixtune.engine.request import SequenceOutput
from prefixtune.errors import ConfigError, DataError, PrefixError
from prefixtune.evaluation.evaluate import evaluate, instruction_format
from prefixtune.evaluation.metrics import measure
from prefixtune.evaluation.scores import write_evaluation
from prefixtune.inference.classify import classify
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import complete, generate
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat
from prefixtune.report import read_results

WORDS = ("a red fox", "the owl", "one hare at night", "two swans", "a", "badgers of the hill", "an otter")
EXAMPLES = [
    Example(
        f"{word} {number}",
        (f"{word} sleeps.", f"Here sleeps {word}, no {number}."),
        groups={"parity": ("even", "odd")[number % 2], "rest": str(number % 3)},
    )
    for number, word in enumerate(WORDS)
]
CONFIG = GenerateConfig(max_new_tokens=6, batch_size=2)
METRIC_NAMES = ("bleu", "chrf", "ter", "nist")


@pytest.fixture(scope="module")
def prefix(llama, random_prefix):
    return random_prefix(llama, 3)


@pytest.fixture
def fake_outputs(monkeypatch):
    """Makes the model write these outputs; without any, its own. Returns the list of the texts that are asked for."""

    def install(outputs=None):
        asked = []

        def count(backbone, prompts, config, numbers=None, engine=None):
            if outputs is not None:
                for number in numbers:
                    yield number, SequenceOutput("", 0, (), list(outputs.values())[number], "stop")
                return
            for number, output in complete(backbone, prompts, config, numbers):
                asked.append(number)
                yield number, output

        replace_everywhere(monkeypatch, complete, count)
        return asked

    return install


SAID = {
    example.source: text
    for example, text in zip(
        EXAMPLES,
        ("a red fox sleeps.", "owl", "Here sleeps one hare at night", "swans of the hill", "", "badgers", "an otter"),
        strict=True,
    )
}


# --- scores ----------------------------------------------------------------------------------------------------------


def test_outputs_that_did_not_end_are_counted(llama, prefix, tmp_path):
    sources = [e.source for e in EXAMPLES]
    whole = generate(llama, sources, prefix, max_new_tokens=6)
    # A string that ends one output at its very last token.
    stop = next(text[-1] for text in whole if len(text) > 1 and text[-1] not in text[:-1])
    config = CONFIG.replace(stop=(stop,))
    longer = generate(llama, sources, prefix, config=config.replace(max_new_tokens=12))
    file = tmp_path / "decoded.jsonl"
    outcome = evaluate(llama, EXAMPLES, prefix, config=config, resume_file=file)
    unended = [short != long for short, long in zip(outcome.outputs, longer, strict=True)]
    assert 0 < sum(unended) < len(EXAMPLES)
    assert outcome.summary()["num_unended"] == sum(unended)
    assert evaluate(llama, EXAMPLES, prefix, config=config, resume_file=file).num_unended == sum(unended)


def test_a_group_scores_as_if_it_were_all_there_is(llama, fake_outputs):
    fake_outputs(SAID)
    outcome = evaluate(llama, EXAMPLES, config=CONFIG, metrics=METRIC_NAMES)
    assert {name: [*groups] for name, groups in outcome.groups.items()} == {
        "parity": ["even", "odd"],
        "rest": ["0", "1", "2"],
    }
    for grouping, groups in outcome.groups.items():
        for name, found in groups.items():
            part = [example for example in EXAMPLES if example.groups[grouping] == name]
            assert found.num_examples == len(part)
            # NIST asks all references how rare a word is: those of the group.
            alone = measure([SAID[e.source] for e in part], [e.targets for e in part], metrics=METRIC_NAMES)
            assert found.scores.keys() == alone.keys()
            for metric, score in alone.items():
                assert found.scores[metric].score == pytest.approx(score.score, rel=1e-9)


def test_an_example_without_a_reference_is_reported(llama, fake_outputs):
    requests = fake_outputs()
    with pytest.raises(DataError, match="example 8"):
        evaluate(llama, [*EXAMPLES, Example("nobody", (" \n",))], config=CONFIG)
    with pytest.raises(DataError, match="no example"):
        evaluate(llama, [], config=CONFIG)
    assert requests == []


def test_a_label_that_the_prefix_does_not_know_is_refused(llama, random_prefix):
    labels = {"kind": "classification", "by": "words", "names": ["yes", "no"], "words": ["yes", "no"]}
    prefix = Prefix(random_prefix(llama, 3).layers, {"labels": labels}).detach()
    known = [Example("good", ("yes",)), Example("bad", ("no",))]
    assert len(evaluate(llama, known, prefix).outputs) == 2
    with pytest.raises(DataError, match="'Yes' of example 3") as caught:
        evaluate(llama, [*known, Example("fine", ("Yes",))], prefix)
    assert "did you mean 'yes'" in caught.value.hint


def test_labels_of_other_weights_are_chosen_by_their_words(llama, prefix):
    words = {"yes": "fox", "no": "owl", "perhaps": "swan"}
    labels = Labels("classification", "words", tuple(words), tuple(words.values()))
    examples = [Example("good", ("yes",)), Example("bad", ("no",))]
    chosen = classify(llama, ["good", "bad"], labels=labels.words)
    outcome = evaluate(llama, examples, labels=labels)
    assert [words[name] for name in outcome.outputs] == [prediction.label for prediction in chosen]
    with pytest.raises(DataError, match="label 'Yes'"):
        evaluate(llama, [Example("fine", ("Yes",))], labels=labels)
    with pytest.raises(ConfigError, match="a prefix has its own"):
        evaluate(llama, examples, prefix, labels=labels)


# --- resuming -------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def kill_at(count):
    def on_batch(done):
        if done >= count:
            raise Killed

    return on_batch


SAMPLED = CONFIG.replace(temperature=1.0, seed=3)


def test_a_stopped_evaluation_continues(llama, prefix, fake_outputs, tmp_path):
    asked, config = fake_outputs(), SAMPLED
    counts = []
    whole = evaluate(llama, EXAMPLES, prefix, config=config, on_batch=counts.append)
    assert counts == [1, 2, 3, 4, 5, 6, 7]
    assert list(whole.outputs) == generate(llama, [e.source for e in EXAMPLES], prefix, config=config)
    asked.clear()
    kept = tmp_path / "made" / "decoded.jsonl"
    with pytest.raises(Killed):
        evaluate(llama, EXAMPLES, prefix, config=config, resume_file=kept, on_batch=kill_at(4))
    assert len(asked) == 4
    resumed = evaluate(llama, EXAMPLES, prefix, config=config, resume_file=kept)
    assert sorted(asked) == list(range(7)), "a text was decoded twice, or not at all"
    assert resumed.outputs == whole.outputs
    assert resumed.scores == whole.scores
    # What is complete is not decoded again, whatever scores are requested; the time is still that of the decoding.
    again = evaluate(llama, EXAMPLES, prefix, config=config, resume_file=kept, metrics=["ter"])
    assert len(asked) == 7
    assert again.outputs == whole.outputs
    assert again.seconds == pytest.approx(resumed.seconds, abs=1e-4)
    assert again.seconds > 0


def test_an_incomplete_last_line_is_decoded_again(llama, fake_outputs, tmp_path):
    asked = fake_outputs()
    kept = tmp_path / "decoded.jsonl"
    whole = evaluate(llama, EXAMPLES, config=CONFIG, resume_file=kept)
    kept.write_bytes(kept.read_bytes()[:-200])
    asked.clear()
    assert evaluate(llama, EXAMPLES, config=CONFIG, resume_file=kept).outputs == whole.outputs
    assert len(asked) == 2


def test_outputs_of_another_evaluation_are_refused(llama, prefix, random_prefix, tiny_backbone, tmp_path):
    kept = tmp_path / "decoded.jsonl"
    evaluate(llama, EXAMPLES[:2], prefix, config=CONFIG, resume_file=kept)
    before = kept.read_bytes()
    tuned = tiny_backbone("llama")
    with torch.no_grad():
        tuned.model.model.layers[1].mlp.down_proj.weight.mul_(1.1)
    others = {
        "prefix": ((llama, EXAMPLES[:2], random_prefix(llama, 3, seed=1)), {}),
        "no prefix": ((llama, EXAMPLES[:2]), {}),
        "weights": ((tuned, EXAMPLES[:2], prefix), {}),
        "more data": ((llama, EXAMPLES[:3], prefix), {}),
        "other data": ((llama, EXAMPLES[1:3], prefix), {}),
        "decoding": ((llama, EXAMPLES[:2], prefix), {"config": CONFIG.replace(num_beams=2)}),
        "format": ((llama, EXAMPLES[:2], prefix), {"text_format": TextFormat("{source}:")}),
    }
    for name, (arguments, changes) in others.items():
        with pytest.raises(ConfigError, match="outputs of another evaluation") as error:
            evaluate(*arguments, resume_file=kept, **{"config": CONFIG, **changes})
        assert "another output folder" in error.value.hint, name
    assert kept.read_bytes() == before


def test_a_greedy_evaluation_continues_with_other_batches(llama, fake_outputs, tmp_path):
    requests = fake_outputs()
    greedy, sampled = tmp_path / "greedy.jsonl", tmp_path / "sampled.jsonl"
    whole = evaluate(llama, EXAMPLES, config=CONFIG, resume_file=greedy)
    evaluate(llama, EXAMPLES[:2], config=SAMPLED, resume_file=sampled)
    requests.clear()
    for changes in ({"batch_size": 1}, {"seed": 5}):
        again = evaluate(llama, EXAMPLES, config=CONFIG.replace(**changes), resume_file=greedy)
        assert again.outputs == whole.outputs
        with pytest.raises(ConfigError, match="outputs of another evaluation"):
            evaluate(llama, EXAMPLES[:2], config=SAMPLED.replace(**changes), resume_file=sampled)
    assert requests == []


def test_a_broken_resume_file_is_reported_before_anything_is_decoded(llama, tmp_path):
    kept = tmp_path / "decoded.jsonl"
    kept.write_bytes(b"\xff\n")
    batches = []
    with pytest.raises(PrefixError):
        evaluate(llama, EXAMPLES[:2], config=CONFIG, resume_file=kept, on_batch=batches.append)
    assert batches == []


# --- shots -----------------------------------------------------------------------------------------------------------


# --- on disk ---------------------------------------------------------------------------------------------------------


def strict(text):
    """Read JSON as its standard has it: without NaN and infinity."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_the_folder_is_valid_and_readable_by_reports(llama, fake_outputs, tmp_path):
    fake_outputs(SAID)
    outcome = evaluate(llama, EXAMPLES, config=CONFIG, metrics=METRIC_NAMES, intervals=True)
    facts = {"title": "a title", "task": "toy", "settings": {"decoding": CONFIG.to_dict()}, "sample": 3}
    write_evaluation(tmp_path / "new", outcome, EXAMPLES, **facts)
    summary = strict((tmp_path / "new" / "evaluation.json").read_text(encoding="utf-8"))
    assert summary.items() >= {**outcome.summary(), "kind": "evaluation", "task": "toy", "sample": 3}.items()
    assert summary["settings"]["decoding"]["max_new_tokens"] == 6
    rows = [strict(line) for line in (tmp_path / "new" / "outputs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[1] == {
        "number": 1,
        "source": "the owl 1",
        "references": ["the owl sleeps.", "Here sleeps the owl, no 1."],
        "output": "owl",
        "groups": {"parity": "odd", "rest": "1"},
    }
    run = read_results(tmp_path / "new")
    assert [row.output for row in run.outputs] == list(outcome.outputs)
    for name, score in outcome.scores.items():
        read = run.evaluation.scores[name]
        assert (read.score, read.interval, read.higher_is_better) == (score.score, score.interval, name != "ter")


def test_an_instructed_model_stops_where_its_turn_ends(tiny_backbone, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<pad>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.chat_template = template
    backbone = dataclasses.replace(tiny_backbone("llama"), tokenizer=tokenizer, tokenizer_cache={})
    form = instruction_format(backbone, "Say it:")
    options = {"max_new_tokens": 60, "temperature": 9.0, "seed": 1}
    outputs = generate(backbone, list(WORDS), text_format=form, **options)
    asked = [[{"role": "user", "content": f"Say it:\n{word}"}] for word in WORDS]
    assert outputs == generate(backbone, asked, **options)
    assert outputs != generate(backbone, list(WORDS), text_format=dataclasses.replace(form, end=""), **options)
    # Where the tokenizer's own end token ends a turn, the format names none, as ever: evaluations of before go on.
    tokenizer.chat_template = template.replace("<pad>", "</s>")
    same = dataclasses.replace(backbone, tokenizer_cache={})
    form = instruction_format(same, "Say it:", [EXAMPLES[0]])
    assert form == TextFormat(form.prompt, "{target}")


TEXTS = ["the pub is near the river", "it rained", "a long walk by the river " * 4]


def test_the_perplexity_of_texts_is_that_of_transformers(llama):
    outcome = evaluate(llama, [{"text": text} for text in TEXTS])
    losses, tokens = [], []
    for text in TEXTS:
        ids = torch.tensor([[*llama.encode(llama.separator), *llama.encode(text), llama.eos_id]])
        with torch.no_grad():
            loss = llama.model(input_ids=ids, labels=ids).loss
        tokens.append(ids.shape[1] - 1)
        losses.append(float(loss) * tokens[-1])
    assert outcome.scores["perplexity"].score == pytest.approx(math.exp(sum(losses) / sum(tokens)), rel=1e-4)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert outcome.scores["bits_per_byte"].score == pytest.approx(sum(losses) / math.log(2) / num_bytes, rel=1e-4)
    assert outcome.outputs[1].endswith(f"of {tokens[1]} tokens")
    assert not outcome.scores["perplexity"].higher_is_better


def test_a_long_text_counts_every_token_once_and_a_batch_changes_nothing(llama):
    long = Example("", (" ".join(TEXTS * 60),))
    seen = []
    alone = evaluate(llama, [long]).scores["perplexity"].score
    both = evaluate(llama, [long, Example("", ("it rained",)), long], on_batch=seen.append, intervals=True)
    assert seen[-1] == 3
    assert seen == sorted(seen)
    low, high = both.scores["perplexity"].interval or (0, 0)
    assert low <= both.scores["perplexity"].score <= high
    assert both.outputs[0] == both.outputs[2] == f"perplexity {alone:.3f} of {both.outputs[0].split()[-2]} tokens"


def test_max_length_is_that_of_the_windows(llama):
    text = {"text": " ".join(TEXTS)}
    whole, short = (evaluate(llama, [text], max_total_length=length).scores for length in (0, 16))
    stored = evaluate(llama, [text], text_format=replace(TEXT_FORMAT, max_length=16)).scores
    assert short["perplexity"].score == stored["perplexity"].score != whole["perplexity"].score
    assert short["bits_per_byte"].implementation.endswith("windows of 16 positions")
    assert whole["perplexity"].implementation.endswith(f"windows of {llama.max_positions} positions")


def test_an_encoder_decoder_cannot_go_on_with_a_text(tiny_backbone):
    with pytest.raises(ConfigError):
        evaluate(tiny_backbone("t5"), [{"text": "it rained"}])
