"""`prefixtune generate`: what its texts are, what it takes, and what it refuses before the backbone loads."""

import io
import json
import tomllib

import pytest

from command_line import call
from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.cli.main import main
from prefixtune.data import TASKS
from prefixtune.inference.classify import classify
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate as generate_texts
from prefixtune.prefix.compose import concatenate
from prefixtune.prefix.prefix import Prefix, save_prefix
from prefixtune.prefix.text_format import TextFormat
from prefixtune.training.artifact import load_tuned
from prefixtune.training.train import train

SHORT = ("--max-new-tokens", "4", "--dtype", "float32", "--device", "cpu", "--quiet")


@pytest.fixture(scope="module")
def model(tmp_path_factory, save_model):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def backbone(model):
    return load_backbone(model, device="cpu")


@pytest.fixture(scope="module")
def prefixes(backbone, save_random_prefix, tmp_path_factory):
    """Two prefixes, the first of the task e2e, which decodes with five beams and at least five tokens."""
    folder = tmp_path_factory.mktemp("prefixes")
    return [
        str(save_random_prefix(folder / f"{task}.safetensors", backbone, 3, seed, task=task))
        for seed, task in enumerate(("e2e", "records"))
    ]


@pytest.fixture
def no_loading(monkeypatch):
    def load(*_, **__):
        raise AssertionError("the backbone was loaded before the options were checked")

    monkeypatch.setattr("prefixtune.backbone.load.load_backbone", load)


def outputs(capsys, *words):
    assert main(["generate", *words, *SHORT]) == 0
    return lines_of(capsys.readouterr().out)


def lines_of(text):
    # The tiny model writes characters that `splitlines` takes for line breaks.
    return text.removesuffix("\n").split("\n")


def in_lines(texts):
    return [text.replace("\n", "\\n").replace("\r", "\\r") for text in texts]


def test_joined_prefixes_are_those_of_the_composed_file(backbone, save_random_prefix, tmp_path, capsys):
    files = {}
    # A + within the name of a file that exists is part of that name.
    for seed, name in enumerate(("manual", "c+style", "user")):
        path = tmp_path / f"{name}.safetensors"
        files[name] = str(save_random_prefix(path, backbone, 2 + seed, seed, task="records"))
    mixes = [("manual", "c+style"), ("c+style", "user", "manual"), ("user",)]
    texts, config = ["one text", "another", "a third"], GenerateConfig(max_new_tokens=4)
    written = {}
    for index, (mix, text) in enumerate(zip(mixes, texts, strict=True)):
        composed = concatenate([load_prefix(files[name], backbone) for name in mix], backbone.rotation)
        path = save_prefix(tmp_path / f"composed-{index}.safetensors", composed)
        (written[mix],) = in_lines(generate_texts(backbone, [text], path, config=config))
    named = ["+".join(files[name] for name in mix) for mix in mixes]
    options = [word for name in named for word in ("--prefix", name)]
    rows = [json.loads(row) for row in outputs(capsys, *texts, *options, "--json")]
    assert in_lines([row["output"] for row in rows]) == list(written.values())
    assert [row["prefix"] for row in rows] == named
    assert outputs(capsys, texts[1], "--prefix", named[1], "--stream")[0].strip() == written[mixes[1]].strip()


def test_what_cannot_be_joined_is_said_before_the_model_loads(
    backbone, save_random_prefix, tmp_path, no_loading, capsys
):
    most = backbone.max_positions
    files = [str(save_random_prefix(tmp_path / f"{n}.safetensors", backbone, most // 2, n)) for n in range(2)]
    for command in (["generate", "a"], ["chat"]):
        assert main([*command, "--prefix", "+".join(files)]) == 2
        assert str(most) in capsys.readouterr().err


def test_blank_lines_have_empty_results(prefixes, capsys, monkeypatch):
    lines = "one\n\ntwo\n  \n"
    alone = outputs(capsys, "one", "two", "--prefix", prefixes[1])
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main(["generate", "--prefix", prefixes[1], *SHORT[:-1]]) == 0
    assert lines_of(capsys.readouterr().out) == [alone[0], "", alone[1], ""]
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    once_per_line = ["--prefix", prefixes[1]] * 4
    rows = [json.loads(row) for row in outputs(capsys, "--json", *once_per_line)]
    assert in_lines([row["output"] for row in rows]) == [alone[0], "", alone[1], ""]
    assert ["note" in row for row in rows] == [False, True, False, True]


@pytest.mark.parametrize("method", ["prefix", "full"])
def test_a_run_of_any_method_generates(method, model, tmp_path, capsys):
    example = {"source": "one", "targets": ["two", "three"]}
    settings = {"max_steps": 3, "prefix_length": 2, "learning_rate": 0.1, "dtype": "float32", "device": "cpu"}
    result = train(
        backbone=str(model), examples=[example], method=method, output=str(tmp_path), progress=False, **settings
    )
    shown = outputs(capsys, "--run", str(tmp_path), "one", "other")
    if method == "prefix":
        expected = generate_texts(load_backbone(model, device="cpu"), ["one", "other"], result.path, max_new_tokens=4)
    else:
        tuned, form = load_tuned(result.path, device="cpu")
        expected = generate_texts(tuned, ["one", "other"], text_format=form, max_new_tokens=4)
    assert shown == in_lines(expected)


def test_a_classifier_of_any_method_chooses_among_its_own_labels_by_their_words(model, tmp_path, capsys):
    words = {"good": "near", "bad": "rained", "mid": "river"}
    examples = [{"source": f"{label} day", "targets": [label]} for label in words]
    settings = {"max_steps": 2, "learning_rate": 0.1, "dtype": "float32", "device": "cpu", "task": "classification"}
    label_words = ",".join(f"{label}={word}" for label, word in words.items())
    train(
        backbone=str(model), examples=examples, method="full", output=str(tmp_path / "run"), progress=False,
        label_words=label_words, **settings,
    )  # fmt: skip
    tuned, form = load_tuned(tmp_path / "run" / "weights.safetensors", device="cpu")
    texts = ["a good day", "a bad one"]
    expected = classify(tuned, texts, labels=list(words.values()), text_format=form)
    run = ("--run", str(tmp_path / "run"), "--json")
    rows = [json.loads(row) for row in outputs(capsys, *run, *texts)]
    for row, prediction in zip(rows, expected, strict=True):
        assert words[row["output"]] == prediction.label
        shares = {words[label]: share for label, share in row["probabilities"].items()}
        assert shares == pytest.approx(prediction.probabilities, abs=1e-5)


@pytest.mark.parametrize(
    ("row", "text", "more"),
    [
        ({"text": "the pub is near"}, "the pub is near", ()),
        ({"name": "Aromi", "food": "soup"}, "Aromi is soup", ()),
        ({"name": "Aromi", "food": "soup", "prompt": "Say"}, "Say", ("--form", "prompt")),
    ],
)
def test_rows_need_no_targets(row, text, more, prefixes, tmp_path, capsys):
    prefix = load_prefix(prefixes[1])
    form = {**TextFormat().to_dict(), "source": "{name} is {food}", "target_template": "text"}
    file = save_prefix(tmp_path / "p.safetensors", Prefix(prefix.layers, {**prefix.header, "text_format": form}))
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    rows = outputs(capsys, "--data", str(tmp_path / "rows.jsonl"), "--prefix", str(file), "--json", *more)
    (expected,) = outputs(capsys, text, "--prefix", str(file), "--json")
    for found in map(json.loads, rows):
        assert found["output"] == json.loads(expected)["output"]
        assert text == (found["text"] if "text" in found else found["messages"][-1]["content"])


def test_a_byte_order_mark_on_stdin_is_no_text(prefixes, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfab\r\ncd\n"), encoding="latin-1"))
    monkeypatch.setattr("sys.argv", ["prefixtune", "generate", "--prefix", prefixes[1], "--json", *SHORT])
    assert main() == 0
    assert [json.loads(line)["text"] for line in lines_of(capsys.readouterr().out)] == ["ab", "cd"]


def test_print_config_shows_the_settings_that_result(prefixes, capsys, no_loading):
    assert call("generate", "--print-config", "--prefix", prefixes[0], "--top-k", "5", "--temperature", "1") == 0
    shown = GenerateConfig(**tomllib.loads(capsys.readouterr().out))
    values = {name: value for name, value in TASKS["e2e"].decoding.items() if name != "num_beams"}
    assert shown == GenerateConfig(**values, top_k=5, temperature=1)


def test_outputs_may_be_as_long_as_the_longest_target_of_records(
    backbone, save_random_prefix, tmp_path, capsys, no_loading
):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"source": "ab", "target": "c"}))
    form = {**TextFormat().to_dict(), "longest_target": 162}
    file = save_random_prefix(tmp_path / "p.safetensors", backbone, task="records", text_format=form)
    for command in (["generate"], ["evaluate", "--data", str(data)]):
        assert call(*command, "--print-config", "--prefix", file) == 0
        assert tomllib.loads(capsys.readouterr().out)["max_new_tokens"] == 162


def test_an_output_does_not_steer_a_terminal(prefixes, capsys, monkeypatch):
    monkeypatch.setattr("prefixtune.inference.generate.generate", lambda *_, **__: ["a\x1b[2Jb"])
    monkeypatch.setattr("prefixtune.inference.generate.stream", lambda *_, **__: iter(["a\x1b", "[2Jb"]))
    words = ["generate", "--prefix", prefixes[1], "one", *SHORT[:-1], "--quiet"]
    assert [main(words), main([*words, "--stream"])] == [0, 0]
    assert capsys.readouterr().out == "a\x1b[2Jb\n" * 2
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert [main(words), main([*words, "--stream"])] == [0, 0]
    assert capsys.readouterr().out == "a\ufffd[2Jb\n" * 2


def test_texts_are_routed_to_the_memory_with_the_nearest_question(backbone, save_random_prefix, tmp_path, capsys):
    files = []
    for seed, animal in enumerate(("owl", "fox")):
        questions = [[f"Where is the {animal}?", "here"], ["When?", "now"]]
        path = tmp_path / f"{animal}.safetensors"
        files.append(str(save_random_prefix(path, backbone, 3, seed, questions=questions)))
    given = [word for file in files for word in ("--prefix", file)]
    texts = ["The Fox, please", "which owl", "fox or no fox", "zzz"]
    assert main(["generate", *given, "--route", "--json", *texts, *SHORT]) == 0
    rows = [json.loads(line) for line in lines_of(capsys.readouterr().out)]
    assert [row["prefix"] for row in rows] == [files[1], files[0], files[1], None]
    fox, owl = load_prefix(files[1], backbone), load_prefix(files[0], backbone)
    config = GenerateConfig(max_new_tokens=4)
    assert [row["output"] for row in rows] == generate_texts(backbone, texts, [fox, owl, fox, None], config=config)
    plain = str(save_random_prefix(tmp_path / "plain.safetensors", backbone))
    assert main(["generate", "--prefix", files[0], "--prefix", plain, "--route", "fox", *SHORT]) == 2
    assert main(["generate", "--route", "fox", *SHORT]) == 2
