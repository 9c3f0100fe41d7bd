"""The text format in a header: what is read, what is refused, and what becomes of long sources."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefixtune.batching import encode_examples, encode_prompts
from prefixtune.checkpoint import load_prefix, make_header, save_prefix
from prefixtune.config import TrainConfig
from prefixtune.engine import PrefixStore
from prefixtune.errors import CheckpointError, DataError, RequestError
from prefixtune.evaluation import evaluate
from prefixtune.generation import GenerateConfig, generate, prepare_prompts, stream
from prefixtune.labelling import classify
from prefixtune.prefix import Prefix
from prefixtune.tasks import Example
from prefixtune.text_format import MAX_TEMPLATE_CHARS, TargetStream, TextFormat, cut_prompt, read_text_format
from prefixtune.training import train

Make = Callable[..., Any]
OLD = {"prompt": "Q: {source}{separator}", "target": " {target}", "separator": "<s>", "end": "</s>", "source": "{a}"}


@pytest.fixture(scope="module")
def llama(tiny_backbone: Make) -> Any:
    return tiny_backbone("llama")


# --- reading ----------------------------------------------------------------------------------------------------------


def test_what_is_stored_is_read_again():
    made = TextFormat("[{source}{separator}", "<{target}>", "<s>", "</s>", "{a}", "{b} END", 128, "cut", 20)
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
        ({"prompt": "no text"}, "does not contain {source}"),
        ({"prompt": "{source}" * 5000}, "at most 16,384"),
        ({"prompt": "{source}" * 2}, "contains {source} 2 times"),
        ({"target": "{target}{target}"}, "contains {target} 2 times"),
        ({"target": "x"}, "does not contain {target}"),
        ({"prompt": "{source}" + "{separator}" * 9}, "{separator} 9 times"),
        ({"separator": "x" * 257}, "separator has 257 characters"),
        ({"separator": "{source}"}, "separator contains {source}"),
        ({"source": "{a}" * 5}, "repeats the column 'a' 5 times"),
        ({"target_template": "{a}" * 5}, "repeats the column 'a' 5 times"),
        ({"prompt": 3}, "prompt is 3"),
        ({"max_length": -1}, "max_length is -1"),
        ({"max_length": True}, "max_length is True"),
        ({"max_length": 2**40}, "max_length is"),
        ({"on_too_long": "ignore"}, "must be cut or error"),
        ({"prmopt": "{source}"}, "unknown field 'prmopt'"),
        ([], "must be an object"),
    ],
)
def test_what_cannot_be_used_is_refused(stored: Any, reason: str):
    with pytest.raises(CheckpointError, match="text format") as caught:
        read_text_format({"text_format": stored})
    assert reason in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("prompt", ["{source}" * 2000, "nothing"])
def test_a_file_with_a_hostile_template_is_refused_everywhere(
    llama: Any, random_prefix: Make, rewrite_header: Make, tmp_path: Path, prompt: str
):
    form = {"prompt": prompt, "target": "{target}"}
    made = Prefix(random_prefix(llama, 3).layers, make_header(llama, task="records"))
    with pytest.raises(CheckpointError, match="text format"):
        save_prefix(tmp_path / "bad.safetensors", Prefix(made.layers, {**made.header, "text_format": form}))
    path = rewrite_header(save_prefix(tmp_path / "bad.safetensors", made), text_format=form)
    with pytest.raises(CheckpointError, match="text format"):
        load_prefix(path)
    store = PrefixStore(tmp_path, llama)
    assert "bad" not in store
    assert "text format" in store.refused["bad"]


def test_formatting_takes_no_more_than_the_bounds_allow():
    largest = "{source}" + "{separator}" * 8
    made = read_text_format(
        {"text_format": {"prompt": largest + "x" * (MAX_TEMPLATE_CHARS - len(largest)), "separator": "s" * 256}}
    )
    assert made is not None
    source = "y" * 10**6
    began = time.perf_counter()
    text = made.format_prompt(source, "")
    assert len(text) <= len(source) + MAX_TEMPLATE_CHARS + 8 * 256
    assert time.perf_counter() - began < 1


def test_training_refuses_a_template_that_no_header_may_hold(llama: Any, tmp_path: Path):
    config = TrainConfig(prompt_format="{source}{source}", output=str(tmp_path), max_steps=1)
    with pytest.raises(DataError, match="2 times"):
        train(config, backbone=llama, examples=[Example("a", ("b",))])


def test_the_stored_separator_counts(llama: Any, random_prefix: Make):
    """Not that of a tokenizer that may have changed since."""
    header = {"text_format": {"prompt": "{source}{separator}", "target": "{target}", "separator": "#"}}
    prefix = Prefix(random_prefix(llama, 3).layers, header)
    prompts = prepare_prompts(llama, ["ab"], [prefix], GenerateConfig(max_new_tokens=3))
    assert prompts.ids == (llama.encode("ab#"),)


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["  Aromi is  a pub. ", "<< Aromi >>", "", "   ", "<<", ">> x <<", "a\n b \n"])
@pytest.mark.parametrize("target", [" {target} ", "<<{target}>>", "{target} END"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_pieces_joined_are_the_target(output: str, target: str, size: int):
    form = TextFormat(target=target)
    made = TargetStream(form)
    pieces = [made.add(output[start : start + size]) for start in range(0, len(output), size)]
    assert "".join([*pieces, made.add("", last=True)]) == form.extract_target(output)


# --- long sources -----------------------------------------------------------------------------------------------------

LONG = [Example("abcdefghij" * number, ("xyz" * number,)) for number in (1, 2, 3, 6)]


def trained(backbone: Any, folder: Path, **options: Any) -> Prefix:
    config = TrainConfig(
        output=str(folder), max_steps=1, prefix_length=2, reparameterization="none", dtype="float32", **options
    )
    result = train(config, backbone=backbone, examples=LONG)
    assert result.prefix is not None
    return result.prefix


def test_generation_cuts_as_training_did(llama: Any, tmp_path: Path):
    prefix = trained(llama, tmp_path, max_length=50)
    form = read_text_format(prefix.header)
    assert form is not None
    assert (form.max_length, form.on_too_long, form.longest_target) == (50, "cut", len(" " + "xyz" * 6 + " ") + 1)
    encoding = encode_examples(llama, LONG, form, prefix_length=2, max_length=50)
    assert encoding.num_cut == 1
    sources = [example.source for example in LONG]
    told: list[Any] = []
    prompts = prepare_prompts(llama, sources, [prefix] * 4, GenerateConfig(max_new_tokens=5), on_cut=told.append)
    # The longest target left the least room; whatever is to be written, no source gets more than that.
    assert prompts.ids[3] == list(encoding.examples[3].prompt)
    assert [len(ids) for ids in prompts.ids] == [13, 23, 29, 29]
    assert {ids[-1] for ids in prompts.ids} == {llama.tokenizer.bos_token_id}
    assert told == [[2, 3]]
    with pytest.warns(UserWarning, match="2 of 4 sources were cut"):
        outputs = generate(llama, sources, prefix, max_new_tokens=5)
    pieces: list[Any] = []
    assert "".join(stream(llama, sources[3], prefix, max_new_tokens=5, on_cut=pieces.append)) == outputs[3]
    assert pieces == [[0]]


def test_options_win_over_the_header(llama: Any, tmp_path: Path):
    prefix = trained(llama, tmp_path, max_length=50)
    sources = [example.source for example in LONG]
    with pytest.raises(RequestError, match="text 3 takes 33 tokens, but max_length 50 allows 29"):
        generate(llama, sources, prefix, max_new_tokens=5, on_too_long="error")
    with pytest.warns(UserWarning, match="1 of 4"):
        generate(llama, sources, prefix, max_new_tokens=5, max_total_length=54)
    # The bare model refuses, unless it is asked to cut.
    longer = ["a" * 2 * (llama.max_positions or 0)]
    with pytest.raises(RequestError, match="positions"):
        generate(llama, longer, max_new_tokens=5)
    with pytest.warns(UserWarning, match="1 of 1"):
        generate(llama, longer, max_new_tokens=5, on_too_long="cut")


def test_training_that_refuses_long_sources_is_followed(llama: Any, tmp_path: Path):
    config = {"max_length": 100, "on_too_long": "error"}
    prefix = trained(llama, tmp_path, **config)
    with pytest.raises(RequestError, match="max_length 100"):
        generate(llama, ["a" * 90], prefix, max_new_tokens=5)


def test_an_encoder_decoder_cuts_the_source_alone(tiny_backbone: Make, tmp_path: Path):
    bart = tiny_backbone("bart")
    prefix = trained(bart, tmp_path, max_length=30)
    form = read_text_format(prefix.header)
    assert form is not None
    prompts = prepare_prompts(
        bart, [LONG[3].source], [prefix], GenerateConfig(max_new_tokens=20), on_cut=lambda _: None
    )
    encoding = encode_examples(bart, LONG, form, prefix_length=2, max_length=30)
    assert prompts.ids[0] == list(encoding.examples[3].prompt)
    assert len(prompts.ids[0]) == 30


def test_evaluation_checks_all_lengths_before_it_decodes(llama: Any, tmp_path: Path):
    prefix = trained(llama, tmp_path, max_length=50)
    done: list[int] = []
    settings = {"max_new_tokens": 3, "batch_size": 1}
    outcome = evaluate(llama, LONG, prefix, config=GenerateConfig(**settings), on_batch=done.append)
    assert (outcome.num_cut, done) == (2, [1, 2, 3, 4])
    done.clear()
    with pytest.raises(RequestError, match="max_length 50"):
        evaluate(llama, LONG, prefix, config=GenerateConfig(**settings, on_too_long="error"), on_batch=done.append)
    assert done == []


def test_labels_by_words_cut_as_training_did(llama: Any, tmp_path: Path):
    examples = [Example("abcdefghij" * number, (("one", "two")[number % 2],)) for number in (1, 2, 5)]
    config = TrainConfig(
        task="classification", output=str(tmp_path), max_steps=1, prefix_length=2, max_length=40,
        reparameterization="none", dtype="float32", classifier="words",
    )  # fmt: skip
    prefix = train(config, backbone=llama, examples=examples).prefix
    told: list[Any] = []
    sources = [example.source for example in examples]
    cut = classify(llama, sources, prefix, on_cut=told.append)
    assert told == [[2]]
    form = read_text_format(prefix.header) if prefix is not None else None
    assert form is not None
    (whole,) = encode_prompts(llama, form, [sources[2]])
    kept = llama.decode(cut_prompt(whole, 40 - form.longest_target, 2))
    assert classify(llama, [kept.strip()], prefix)[0].probabilities == pytest.approx(cut[2].probabilities, abs=1e-5)
    with pytest.raises(RequestError, match="max_length 40"):
        classify(llama, sources, prefix, on_too_long="error")


def test_a_target_template_is_kept_in_the_header(llama: Any, tmp_path: Path):
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({"a": "x", "b": "y"}) + "\n")
    config = TrainConfig(
        train=str(data), source="<{a}>", target="{b} END", output=str(tmp_path / "run"), max_steps=1, prefix_length=2,
        reparameterization="none", dtype="float32",
    )  # fmt: skip
    prefix = train(config, backbone=llama).prefix
    form = read_text_format(prefix.header) if prefix is not None else None
    assert form is not None
    assert (form.source, form.target_template) == ("<{a}>", "{b} END")


def test_an_older_file_still_loads(llama: Any, random_prefix: Make, tmp_path: Path):
    header = make_header(llama, task="records", text_format=OLD)
    path = save_prefix(tmp_path / "old.safetensors", Prefix(random_prefix(llama, 3).layers, header))
    prefix = load_prefix(path, llama)
    prompts = prepare_prompts(llama, ["ab"], [prefix], GenerateConfig(max_new_tokens=3))
    assert prompts.ids == (llama.encode("Q: ab<s>"),)
