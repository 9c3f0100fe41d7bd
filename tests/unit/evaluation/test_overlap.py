"""Test sources that are also in the training set: counted, warned of, and kept with the scores."""

import json

from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.cli.main import main
from prefixtune.data.examples import Example, Message
from prefixtune.evaluation.data_report import find_overlap, training_examples
from prefixtune.prefix.compose import concatenate
from prefixtune.prefix.prefix import save_prefix
from prefixtune.training.config import TrainConfig
from prefixtune.training.train import train


def write(path, names):
    path.write_text("".join(json.dumps({"name": name, "text": f"{name} eats."}) + "\n" for name in names))
    return str(path)


def test_sources_are_compared_without_their_white_space():
    training = [Example("name : Ann", ("x",)), Example("name : Bo", ("y",))]
    tested = [Example(" name :\tAnn\n"), Example("name : ann"), Example("name : Bo"), Example("name:Bo")]
    found = find_overlap(tested, training, "my.csv")
    assert found.model_dump() == {"count": 2, "num_examples": 4, "train": "my.csv"}
    assert "2 of 4 test sources (50.0%)" in str(found)


def test_a_question_is_the_same_as_a_chat_a_row_or_with_a_system_message():
    system, asked = Message("system", "Be brief."), Message("user", "How high?")
    forms = [Example("How high?"), Example("How high?", messages=(asked,)), Example("x", messages=(system, asked))]
    for one in forms:
        assert find_overlap(forms, [one], "my.jsonl").count == 3
    # What was said before counts.
    longer = Example("x", messages=(Message("user", "Hi"), Message("assistant", "Hello"), asked))
    assert find_overlap([longer], forms, "my.jsonl").count == 0
    assert find_overlap([Example("", ("a text",))], [Example("", ("a  text",))], "my.txt").count == 1


def test_the_training_set_is_read_as_the_run_read_it(tmp_path):
    path = write(tmp_path / "train.jsonl", ["Ann", "Bo", "Cy"])
    config = TrainConfig(train=path, source="Say {name}", target="text", limit=2)
    read = training_examples(config)
    assert [example.source for example in read] == ["Say Ann", "Say Bo"]
    toy = training_examples(TrainConfig(task="toy"))
    assert len(toy) == 320


def test_evaluate_joins_prefixes_and_knows_the_training_set_of_each(tmp_path, save_model, capsys):
    save_model(tmp_path / "model")
    test = write(tmp_path / "test.jsonl", ["Bo", "Zed", "Cy"])
    for run, names in (("one", ["Ann", "Bo"]), ("two", ["Zed", "Di"])):
        settings = {"source": "name", "target": "text", "max_steps": 1, "device": "cpu"}
        training_set = write(tmp_path / f"{run}.jsonl", names)
        train(
            TrainConfig(train=training_set, backbone=str(tmp_path / "model"), output=str(tmp_path / run), **settings),
            progress=False,
        )
    backbone = load_backbone(tmp_path / "model", dtype="float32", device="cpu")
    parts = [load_prefix(tmp_path / run, backbone) for run in ("two", "one")]
    composed = save_prefix(tmp_path / "composed.safetensors", concatenate(parts, backbone.rotation))
    outputs, counts = [], []
    for prefix in (f"{tmp_path / 'two'}+{tmp_path / 'one'}", str(composed), str(tmp_path / "one")):
        words = ["evaluate", "--prefix", prefix, "--data", test, "--target", "text", "--dtype", "float32"]
        written = tmp_path / f"scored{len(outputs)}"
        assert main([*words, "--output", str(written), "--max-new-tokens", "6", "--device", "cpu", "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["prefix"] == prefix
        outputs.append((written / "outputs.jsonl").read_text())
        counts.append((result["overlap"] or {}).get("count"))
    assert outputs[0] == outputs[1] != outputs[2]
    assert counts == [2, None, 1]
