"""The real command line on each form of data, from each kind of file, on a tiny model folder."""

import json

import pytest

from command_line import run
from zoo import store_model

TURNS = [
    {"role": "user", "content": "the pub"},
    {"role": "assistant", "content": "is near"},
    {"role": "user", "content": "the river"},
    {"role": "assistant", "content": "it rained"},
]
FORMS = {
    "prompt": ({"prompt": "the pub", "completion": "is near"}, "prompts and completions: examples 1, targets 2"),
    "document": ({"article": "the pub", "highlights": "is near"}, "documents and summaries: examples 2, targets 2"),
    "text": ({"text": "the pub is near " * 9, "id": 1}, "texts: examples 2, targets 2; not used: id"),
    "messages": ({"messages": TURNS[:2]}, "chats: examples 1, targets 2"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return store_model(tmp_path_factory.mktemp("forms") / "llama", "llama", max_position_embeddings=256)


def train(model, output, data, *more, code=0, stdin=""):
    flags = ("--dtype", "float32", "--max-steps", "2", "--init-text", "a place", "--output", str(output))
    return run("train", "--backbone", model, "--train", str(data), *flags, *more, code=code, stdin=stdin)[1]


@pytest.mark.parametrize("form", FORMS)
def test_train_generate_and_evaluate_with_nothing_but_the_file(form, model, tmp_path):
    row, said = FORMS[form]
    data = tmp_path / "data.jsonl"
    data.write_text(f"{json.dumps(row)}\n" * 2)
    assert f"{data}: read as {said}\n" in train(model, tmp_path / "run", data)
    prefix = str(tmp_path / "run" / "prefix.safetensors")
    header = json.loads(run("inspect", prefix, "--json")[0])["header"]
    assert (header["task"], header["form"]) == ("summarization" if form == "document" else "records", form)
    length = ("--max-new-tokens", "12")  # summaries have at least 11
    out, _ = run("generate", "--prefix", prefix, *length, "--json", "the pub")
    assert json.loads(out)["text"] == "the pub"
    # The perplexity of texts is measured: nothing is written.
    out, _ = run("evaluate", "--prefix", prefix, "--data", str(data), *(() if form == "text" else length), "--json")
    scores = json.loads(out)["scores"]
    assert ("perplexity" in scores) == (form == "text")
    assert json.loads(out)["overlap"]["count"] == json.loads(out)["num_examples"]


def test_standard_input_trains_and_is_resumed(model, tmp_path):
    rows = "".join(json.dumps({"messages": TURNS[:2]}) + "\n" for _ in range(3))
    said = train(model, tmp_path / "run", "-", stdin=rows)
    assert "stdin: read as chats: examples 1, targets 3\n" in said
    more = ("--resume", "--output", str(tmp_path / "run"))
    assert "stdin: read as chats" in run("train", *more, stdin=rows)[1]
    table = "prompt\tcompletion\nthe pub\tis near\n"
    out, err = run("evaluate", "--backbone", model, "--data", "-", "--max-new-tokens", "4", stdin=table)
    assert "stdin: read as prompts and completions: examples 1, targets 1" in err
    assert "1 examples of -" in out
