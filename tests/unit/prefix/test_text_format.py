"""The text format in a header: what is read, what is refused, and what becomes of long sources."""

import json

import pytest

from prefixtune.data import Example
from prefixtune.data.encoding import encode_examples
from prefixtune.data.labels import Labels, encode_labelled
from prefixtune.errors import CheckpointError, ConfigError, DataError, PrefixWarning, RequestError
from prefixtune.evaluation.evaluate import evaluate, few_shot_format, instruction_format
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate, stream
from prefixtune.inference.prompts import prepare_prompts
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat, read_text_format
from prefixtune.training.config import TrainConfig
from prefixtune.training.train import train

OLD = {"prompt": "Q: {source}{separator}", "target": " {target}", "separator": "<s>", "end": "</s>", "source": "{a}"}


# --- reading ----------------------------------------------------------------------------------------------------------


def test_what_is_stored_is_read_again():
    made = TextFormat("[{source}{separator}", "<{target}>", "<s>", "</s>", "{a}", "{b} END", 128, "cut", 20, 90)
    assert read_text_format({"text_format": json.loads(json.dumps(made.to_dict()))}) == made


def test_an_older_header_refuses_long_sources_as_it_did():
    made = read_text_format({"text_format": OLD})
    assert made == TextFormat("Q: {source}{separator}", " {target}", "<s>", "</s>", "{a}")
    assert (made.max_length, made.on_too_long) == (0, "error")
    assert read_text_format({}) is None
    assert read_text_format({"text_format": None}) is None


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        ({"prompt": "no text"}, "prompt"),
        ({"target": "{target}{target}"}, "target"),
        ({"max_length": 2**40}, "max_length"),
        ({"prmopt": "{source}"}, "prmopt"),
        ([], "must be an object"),
    ],
)
def test_what_cannot_be_used_is_refused(stored, reason):
    with pytest.raises(CheckpointError, match="text format") as caught:
        read_text_format({"text_format": stored})
    assert reason in caught.value.message
    assert caught.value.hint


def test_the_stored_separator_counts(llama, random_prefix):
    """Not that of a tokenizer that may have changed since."""
    header = {"text_format": {"prompt": "{source}{separator}", "target": "{target}", "separator": "#"}}
    prefix = Prefix(random_prefix(llama, 3).layers, header)
    prompts = prepare_prompts(llama, ["ab"], [prefix], GenerateConfig(max_new_tokens=3))
    assert [prompt.ids for prompt in prompts] == [llama.encode("ab#")]


def test_a_separator_makes_no_place_for_the_source():
    made = read_text_format({"text_format": {"prompt": "{source}{sou{separator}", "separator": "rce}"}})
    assert made.format_prompt("a", "") == "a{source}"


def test_few_shot_examples_are_whole_or_refused(llama):
    place = "{source}"
    shown = [Example("1+1", ("2",)), Example("a", (f"write {place}",))]
    with pytest.raises(DataError):
        few_shot_format(TextFormat(), shown, "<s>", "</s>")
    with pytest.raises(DataError):
        instruction_format(llama, "Add.", shown)
    with pytest.raises(DataError):
        instruction_format(llama, f"Say {place}.")
    chat = Example("Bye", ("Yes",), messages=[("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")])
    with pytest.raises(DataError):
        few_shot_format(TextFormat(), [chat], "<s>", "</s>")


def test_solved_examples_may_be_code_and_long(llama):
    shown = [Example("f" * 1500, ("int f(){} int g(){}",))] * 12
    for made in (
        few_shot_format(TextFormat(), shown, "<s>", "</s>"),
        instruction_format(llama, "Do it {} {a}.", shown),
    ):
        assert made.format_prompt("x", "").count("(){}") == 24
    with pytest.raises(ConfigError):
        few_shot_format(TextFormat(), shown * 99, "<s>", "</s>")


# --- long sources -----------------------------------------------------------------------------------------------------

LONG = [Example("abcdefghij" * number, ("xyz" * number,)) for number in (1, 2, 3, 6)]


def trained(backbone, folder, **options):
    config = TrainConfig(
        output=str(folder), max_steps=1, prefix_length=2, reparameterization="none", dtype="float32", **options
    )
    result = train(config, backbone=backbone, examples=LONG)
    return result.prefix


def test_generation_cuts_as_training_did(llama, tmp_path):
    prefix = trained(llama, tmp_path, max_length=50)
    form = read_text_format(prefix.header)
    assert (form.max_length, form.on_too_long, form.longest_target) == (50, "cut", len(" " + "xyz" * 6 + " ") + 1)
    encoding = encode_examples(llama, LONG, form, prefix_length=2, max_length=50)
    assert encoding.num_truncated == 1
    sources = [example.source for example in LONG]
    reported = []
    prompts = prepare_prompts(llama, sources, [prefix] * 4, GenerateConfig(max_new_tokens=5), on_cut=reported.append)
    # What training left whole stays whole. The longest target left the least room, and whatever else is cut gets that.
    assert [prompt.ids for prompt in prompts] == [list(example.prompt) for example in encoding.examples]
    assert [len(prompt.ids) for prompt in prompts] == [13, 23, 33, 29]
    assert {prompt.ids[-1] for prompt in prompts} == {llama.tokenizer.bos_token_id}
    assert reported == [[3]]
    with pytest.warns(PrefixWarning, match="1 of 4 sources were truncated"):
        outputs = generate(llama, sources, prefix, max_new_tokens=5)
    pieces = []
    assert "".join(stream(llama, sources[3], prefix, max_new_tokens=5, on_cut=pieces.append)) == outputs[3]
    assert pieces == [[0]]


@pytest.mark.parametrize("policy", ["cut", "error"])
def test_what_training_left_whole_is_neither_cut_nor_refused(llama, tmp_path, policy):
    """Each source had the room that its own target left; generation knows no target."""
    examples = [Example("a" * 80, ("x" * 5,)), Example("b" * 10, ("y" * 60,))]
    dev = [Example("c" * 84, ("z" * 3,)), Example("d" * 5, ("y" * 80,))]
    if policy == "cut":
        examples.append(Example("e" * 99, ("y" * 60,)))
    config = TrainConfig(
        output=str(tmp_path), max_steps=1, prefix_length=2, reparameterization="none", dtype="float32", max_length=100,
        on_too_long=policy,
    )  # fmt: skip
    prefix = train(config, backbone=llama, examples=examples, dev_examples=dev).prefix
    form = read_text_format(prefix.header)
    room = {"prefix_length": 2, "max_length": 100, "on_too_long": policy}
    for data in (examples, dev):
        wanted = encode_examples(llama, data, form, **room)
        sources = [example.source for example in data]
        prompts = prepare_prompts(llama, sources, [prefix] * len(data), GenerateConfig(), on_cut=lambda _: None)
        assert [prompt.ids for prompt in prompts] == [list(example.prompt) for example in wanted.examples]
        assert evaluate(llama, data, prefix, max_new_tokens=2).num_truncated == wanted.num_truncated
    older = {key: value for key, value in prefix.header["text_format"].items() if key != "longest_prompt"}
    with_older = Prefix(prefix.layers, {**prefix.header, "text_format": older})
    cut = []
    shared = {"on_too_long": "cut", "max_new_tokens": 2, "on_cut": cut.append}
    generate(llama, [example.source for example in examples[:2]], with_older, **shared)
    assert cut == [[0]]


def test_the_backbones_positions_cut_as_in_training(llama, tmp_path):
    positions = llama.max_positions
    examples = [Example("a" * (positions - 40), ("x" * 5,)), Example("b" * positions, ("y" * 60,))]
    config = TrainConfig(output=str(tmp_path), max_steps=1, prefix_length=2, reparameterization="none", dtype="float32")
    prefix = train(config, backbone=llama, examples=examples).prefix
    form = read_text_format(prefix.header)
    wanted = encode_examples(llama, examples, form, prefix_length=2)
    assert wanted.num_truncated == 1
    sources = [example.source for example in examples]
    room = positions - 2 - len(wanted.examples[0].prompt)
    for most in (20, 60):
        config = GenerateConfig(max_new_tokens=most)
        prompts = prepare_prompts(llama, sources, [prefix] * 2, config, on_cut=lambda _: None)
        assert [prompt.ids for prompt in prompts] == [list(example.prompt) for example in wanted.examples]
        assert [prompt.new_tokens for prompt in prompts] == [min(most, room), most]
    # The first has fewer positions left than tokens may come; both are written as they would be alone.
    shared = {"max_new_tokens": 60, "min_new_tokens": 60, "on_cut": lambda _: None}
    outputs = generate(llama, sources, prefix, **shared)
    assert outputs == [*generate(llama, sources[:1], prefix, **shared), *generate(llama, sources[1:], prefix, **shared)]


def test_a_cut_never_leaves_the_texts_around_a_source_alone(llama):
    form = TextFormat("instruction instruction: {source}#", "{target}", max_length=28, on_too_long="cut")
    around = len("instruction instruction: #")
    prompts = prepare_prompts(llama, ["abcdef"], [None], GenerateConfig(max_new_tokens=2), form, on_cut=lambda _: None)
    assert llama.decode(prompts[0].ids) == "instruction instruction: ab#"
    with pytest.raises(RequestError):
        generate(llama, ["abcdef"], None, text_format=form, max_new_tokens=2, max_total_length=around)
    example = Example("abcdef", ("xy",))
    (kept,) = encode_examples(llama, [example], form, prefix_length=0, max_length=around + 1 + 3).examples
    assert llama.decode(list(kept.prompt)) == "instruction instruction: a#"
    with pytest.raises(DataError):
        encode_examples(llama, [example], form, prefix_length=0, max_length=around + 3)
    labels = Labels("classification", "head", ("xy", "z"))
    with pytest.raises(DataError):
        encode_labelled(llama, [example], labels, form, prefix_length=0, max_length=around)


def test_options_win_over_the_header(llama, tmp_path):
    prefix = trained(llama, tmp_path, max_length=50)
    sources = [example.source for example in LONG]
    with pytest.raises(RequestError, match="text 4"):
        generate(llama, sources, prefix, max_new_tokens=5, on_too_long="error")
    with pytest.warns(UserWarning, match="1 of 4"):
        generate(llama, sources, prefix, max_new_tokens=5, max_total_length=54)
    # Less than in training: what fitted there need not fit.
    with pytest.warns(UserWarning, match="2 of 4"):
        generate(llama, sources, prefix, max_new_tokens=5, max_total_length=49)
    # The bare model refuses, unless it is asked to cut.
    longer = ["a" * 2 * (llama.max_positions or 0)]
    with pytest.raises(RequestError, match="positions"):
        generate(llama, longer, max_new_tokens=5)
    with pytest.warns(UserWarning, match="1 of 1"):
        generate(llama, longer, max_new_tokens=5, on_too_long="cut")


def test_an_encoder_decoder_cuts_the_source_alone(tiny_backbone, tmp_path):
    bart = tiny_backbone("bart")
    prefix = trained(bart, tmp_path, max_length=30)
    form = read_text_format(prefix.header)
    prompts = prepare_prompts(
        bart, [LONG[3].source], [prefix], GenerateConfig(max_new_tokens=20), on_cut=lambda _: None
    )
    encoding = encode_examples(bart, LONG, form, prefix_length=2, max_length=30)
    assert prompts[0].ids == list(encoding.examples[3].prompt)
    assert len(prompts[0].ids) == 30
