"""The real command line on an encoder-decoder, and with labels and tags, on tiny model folders."""

import json

import pytest

from command_line import run
from restaurant_tables import TABLES
from zoo import store_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    return {
        "t5": store_model(folder / "t5", "t5", enclosing=True),
        "bert": store_model(folder / "bert", "bert", enclosing=True),
        "llama": store_model(folder / "llama", "llama", max_position_embeddings=256),
    }


def train(model, output, *more, code=0):
    flags = ("--dtype", "float32", "--max-steps", "4", "--init-text", "a place", "--output", str(output))
    return run("train", "--backbone", model, *flags, *more, code=code)


def test_an_encoder_decoder(models, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in TABLES))
    files = ("--train", str(data), "--source", "{name} is {food}", "--target", "text")
    train(models["t5"], tmp_path / "run", *files, "--sites", "encoder=6,cross", "--prefix-length", "4")
    prefix = str(tmp_path / "run" / "prefix.safetensors")
    shown = json.loads(run("inspect", prefix, "--json")[0])
    assert shown["prefix_length"] == {"encoder": 6, "cross": 4}
    assert shown["header"]["backbone"]["kind"] == "encoder-decoder"
    assert "fingerprint" in run("inspect", prefix)[0]
    assert "not shifted" in shown["header"]["positions"]["cross"]
    texts = ("Aromi is soup", "Bibi is cake")
    out, _ = run("generate", "--prefix", prefix, "--max-new-tokens", "5", "--num-beams", "2", "--json", *texts)
    assert [json.loads(line)["text"] for line in out.splitlines()] == list(texts)
    _, err = train(models["llama"], tmp_path / "no", *files, "--sites", "cross", code=2)
    assert "cross" in err


def test_labels_with_probabilities(models, tmp_path):
    data = tmp_path / "labels.csv"
    data.write_text("text,label\n" + "".join(f"bag {n},luggage\ntrain {n},timetable\n" for n in range(16)))
    for name, by in (("bert", "head"), ("llama", "words")):
        folder = tmp_path / f"{name}-{by}"
        train(models[name], folder, "--train", str(data), "--classifier", by)
        prefix = str(folder / "prefix.safetensors")
        row = json.loads(run("generate", "--prefix", prefix, "--json", "Where is my bag?")[0])
        assert row["label"] == row["output"] == max(row["probabilities"], key=row["probabilities"].__getitem__)
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-4)
        scores = json.loads(run("evaluate", "--prefix", prefix, "--data", str(data), "--limit", "8", "--json")[0])
        assert set(scores["scores"]) == {"accuracy", "macro_f1"}
    # All labels of the file are to choose from, and the metric that is asked for is given.
    bare = ("--backbone", models["llama"], "--task", "classification", "--data", str(data))
    out, _ = run("evaluate", *bare, "--limit", "1", "--metrics", "accuracy", "--json")
    assert set(json.loads(out)["scores"]) == {"accuracy"}


def test_tags(models, tmp_path):
    data = tmp_path / "data.jsonl"
    rows = [(["The", "Fox", "left"], ["O", "B-TRAIN", "O"]), (["Ask", "Beth"], ["O", "B-NAME"])]
    data.write_text("".join(json.dumps({"tokens": tokens, "tags": tags}) + "\n" for tokens, tags in rows))
    train(models["bert"], tmp_path / "run", "--task", "tagging", "--train", str(data))
    prefix = str(tmp_path / "run" / "prefix.safetensors")
    row = json.loads(run("generate", "--prefix", prefix, "--json", "The Fox left")[0])
    assert row["tokens"] == ["The", "Fox", "left"]
    assert len(row["tags"]) == len(row["probabilities"]) == 3
    scores = json.loads(run("evaluate", "--prefix", prefix, "--data", str(data), "--json")[0])
    assert set(scores["scores"]) == {"span_f1", "accuracy"}
