"""Mistakes that need no model are reported before one loads, by every command; several of them at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import prefixtune.backbone.load
import prefixtune.distillation.distill
import prefixtune.studies.cell
import prefixtune.studies.data
import prefixtune.training.opening
from prefixtune.cli.main import command_options, main
from prefixtune.errors import ConfigError
from prefixtune.prefix.artifact import save_prefix
from prefixtune.prefix.prefix import Head, Prefix

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
}


def prefix_for(path: Path, layers: int = 3, head: Head | None = None, **header: Any) -> str:
    """A prefix file of a model with two KV heads of size 8."""
    pair = torch.zeros(2, 4, 8), torch.ones(2, 4, 8)
    facts = {"backbone": {"name": "model", "kind": "decoder", "fingerprint": "a:b"}, **header}
    return str(save_prefix(path, Prefix({"decoder": (pair,) * layers}, facts, head)))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data, prefixes and what looks like a model; nobody may load it."""

    def loaded(*given: Any, **more: Any) -> Any:
        pytest.fail("the backbone was loaded")

    modules = (prefixtune.backbone.load, prefixtune.training.opening, prefixtune.studies.data)
    for module in (*modules, prefixtune.distillation.distill):
        monkeypatch.setattr(module, "load_backbone", loaded)
    monkeypatch.setattr(prefixtune.studies.cell, "train", loaded)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA))
    rows = [{"name": name, "text": f"{name} eats.", "label": label} for name, label in (("Ann", "a"), ("Bo", "b"))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "one.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "tags.jsonl").write_text('{"tokens": ["a"], "tags": ["B-X"]}\n')
    (tmp_path / "other_script.jsonl").write_text('{"question": "Кто?", "answer": "Мира поёт."}\n', encoding="utf-8")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "file").write_text("no folder")
    prefix_for(tmp_path / "p.safetensors")
    prefix_for(tmp_path / "q.safetensors", backbone={"name": "other", "kind": "decoder"})
    prefix_for(tmp_path / "deep.safetensors", layers=4)
    prefix_for(tmp_path / "labels.safetensors", labels={"kind": "classification", "by": "words", "names": ["a", "b"]})
    labels = {"kind": "classification", "by": "head", "names": ["a", "b"]}
    prefix_for(tmp_path / "head.safetensors", labels=labels, head=Head(torch.ones(2, 32), torch.zeros(2)))
    prefix_for(tmp_path / "adapted.safetensors", adapter="lora")
    return tmp_path


TRAIN = "train --backbone model --train rows.jsonl --source name --target text --output run "
LABELS = "train --backbone model --task classification --train rows.jsonl --source text --target label --output run "
DISTILL = "distill --backbone model "
STUDY = "study length --backbone model --task records --train rows.jsonl --dev rows.jsonl --test rows.jsonl "
MISTAKES = [
    # Files.
    ("train --task e2e --train nowhere.csv", "nowhere.csv does not exist"),
    ("train --task e2e --train rows.jsonl --dev nowhere.csv", "nowhere.csv does not exist"),
    (TRAIN.replace("rows.jsonl", "empty.jsonl"), "empty.jsonl is empty"),
    (TRAIN.replace("rows.jsonl", "model"), "is a folder"),
    (TRAIN.replace("rows.jsonl", "file"), "has no ending"),
    (TRAIN.replace("rows.jsonl", "chats"), "chats does not exist"),
    ("evaluate --task e2e --data nowhere/ --split test", "nowhere does not exist"),
    (TRAIN.replace("--backbone model", "--backbone adapter"), "no config.json"),
    (TRAIN.replace("--backbone model", "--backbone ./nowhere"), "neither a folder of a model"),
    (TRAIN.replace("--backbone model", "--backbone nowhere.gguf"), "there is no GGUF file"),
    (TRAIN.replace("--backbone model", "--backbone smolm2-135m"), "did you mean 'smollm2-135m'?"),
    (TRAIN + "--adapter adapter", "holds no adapter_config.json"),
    (TRAIN + "--initialization prefix --init-prefix nowhere.safetensors", "there is no file 'nowhere.safetensors'"),
    (TRAIN + "--initialization prefix --init-prefix rows.jsonl", "rows.jsonl"),
    (TRAIN + "--init-prefix nowhere.safetensors", "there is no file 'nowhere.safetensors'"),
    (TRAIN + "--initialization words --init-prefix p.safetensors", "but initialization is 'words'"),
    (TRAIN + "--resume", "no run to resume"),
    (TRAIN + "--config nowhere.toml", "nowhere.toml"),
    ("train --together nowhere.toml", "nowhere.toml"),
    # Columns, templates, labels.
    (TRAIN.replace("--source name", "--source nam"), "there is no column 'nam'"),
    (TRAIN.replace("--source name", "--source {name"), "names no column"),
    (TRAIN + "--prompt-format Say", "does not contain {source}"),
    (TRAIN + "--target-format Say", "does not contain {target}"),
    (LABELS.replace("rows.jsonl", "one.jsonl"), "at least two labels are needed"),
    (LABELS + "--label-words c=word", "label_words names 'c'"),
    (LABELS + "--label-words a=x,b=x", "two labels share a word"),
    (LABELS + "--method full --classifier head", "trains no head"),
    (LABELS + "--dev one.jsonl --label-words c=word", "label_words names 'c'"),
    ("train --backbone model --task tagging --train tags.jsonl --classifier words", "too many words"),
    # Options.
    (TRAIN + "--device gpu", "unknown device 'gpu'"),
    (TRAIN + "--patience 3", "patience needs a development file"),
    (TRAIN + "--shard", "among several processes"),
    (TRAIN + "--method prompt --initialization prefix --init-prefix p.safetensors", "cannot start from a prefix"),
    (TRAIN + "--preset papper", "'papper'"),
    # generate
    ("generate --prefix nowhere.safetensors x", "there is no file 'nowhere.safetensors'"),
    ("generate --prefix rows.jsonl x", "rows.jsonl"),
    ("generate --prefix= x", "the name of a prefix is empty"),
    ("generate --prefix p.safetensors --prefix q.safetensors x y", "different backbones"),
    ("generate --prefix p.safetensors --prefix p.safetensors x", "2 prefixes for 1 texts"),
    ("generate --prefix deep.safetensors x", "4 layers"),
    ("generate --prefix p.safetensors --backbone adapter x", "no config.json"),
    ("generate --prefix p.safetensors --adapter adapter x", "holds no adapter_config.json"),
    ("generate --prefix p.safetensors --form prompt x", "--form says what the columns of --data are"),
    ("generate --prefix p.safetensors --device gpu x", "--device is 'gpu', but must be cpu"),
    ("generate --prefix p.safetensors --dtype bf16 x", "'bf16'"),
    ("generate --prefix p.safetensors --quantize int3 x", "--quantize is 'int3', but must be one of 'int8'"),
    ("generate --stream x y", "--stream prints one text"),
    ("generate ok a\udcffb", "TEXTS has 'a\\udcffb', but must be UTF-8 text"),
    ("generate --prefix p.safetensors --num-beams 0 x", "--num-beams is 0, but must be at least 1"),
    ("generate --prefix p.safetensors --prefix labels.safetensors x y", "classification, generation"),
    ("generate --prefix labels.safetensors --stream x", "--stream"),
    # compose, cut, distill, explain, length
    ("compose p.safetensors nowhere.safetensors --output new.safetensors", "there is no file 'nowhere.safetensors'"),
    ("compose p.safetensors deep.safetensors --output new.safetensors", "4 layers"),
    ("cut nowhere.safetensors --length 1 --output new.safetensors", "there is no file 'nowhere.safetensors'"),
    (DISTILL + "--document nowhere.txt --questions rows.jsonl --output run", "nowhere.txt"),
    (DISTILL + "--document nowhere.txt --questions rows.jsonl --output file", "cannot write"),
    (DISTILL + "--document file --questions one.jsonl --output file/run", "cannot write 'file/run"),
    (DISTILL + "--teacher head.safetensors --data rows.jsonl --source name --output run", "gives labels by a head"),
    (DISTILL + "--teacher deep.safetensors --data rows.jsonl --source name --output run", "4 layers"),
    (DISTILL + "--teacher adapted.safetensors --data rows.jsonl --source name --output run", "the adapter 'lora'"),
    ("explain nowhere.safetensors", "there is no file 'nowhere.safetensors'"),
    *(
        (
            f"explain labels.safetensors {option} rows.jsonl --task classification --source text --target name",
            "label 'Ann' of example 1 is not one of the 2 known labels",
        )
        for option in ("--data", "--train")
    ),
    (TRAIN.replace("train ", "length ", 1), "--dev"),
    # evaluate
    ("evaluate --prefix nowhere.safetensors --data rows.jsonl", "there is no file"),
    ("evaluate --prefix p.safetensors --data nowhere.jsonl --source name --target text", "nowhere.jsonl"),
    ("evaluate --prefix p.safetensors --data rows.jsonl --source name", "has no target"),
    ("evaluate --prefix p.safetensors --data rows.jsonl --source name --target nam", "no column 'nam'"),
    ("evaluate --prefix p.safetensors --data rows.jsonl --source name --target text --metrics blue", "'blue'"),
    ("evaluate --prefix p.safetensors --data other_script.jsonl --metrics rouge_l", "ROUGE counts the letters a to z"),
    ("evaluate --prefix p.safetensors --data rows.jsonl --source name --target text --device gpu", "'gpu'"),
    ("evaluate --prefix p.safetensors --data rows.jsonl --source name --target text --output file", "file"),
    ("evaluate --prefix p.safetensors --data rows.jsonl --source name --target text --outputs model", "a folder"),
    ("evaluate --prefix deep.safetensors --data rows.jsonl --source name --target text", "4 layers"),
    ("evaluate --run model --data rows.jsonl --source name --target text", "holds neither"),
    ("evaluate --data tags.jsonl --task tagging --backbone model", "the bare model cannot tag"),
    (
        "evaluate --prefix labels.safetensors --data rows.jsonl --task classification --source text --target label "
        "--intervals",
        "intervals are for texts",
    ),
    (
        "evaluate --prefix p.safetensors --data rows.jsonl --task classification --source text --target label",
        "a prefix for generation cannot be used for classification",
    ),
    ("evaluate --prefix p.safetensors --data tags.jsonl", "a prefix for generation cannot be used for tagging"),
    # convert, export, push, pull, inspect
    ("convert nowhere out.safetensors --to prefixtune --backbone model", "nowhere"),
    ("convert p.safetensors out.bin --to prefixtune --backbone model", "does not end with .safetensors"),
    ("convert p.safetensors file/out.safetensors --to prefixtune --backbone model", "cannot write"),
    ("convert p.safetensors file --to peft --backbone model", "is a file"),
    ("convert p.safetensors out --to peft --backbone model --frozen-tokens -1", "--frozen-tokens is -1"),
    ("convert deep.safetensors out --to peft --backbone model", "4 layers"),
    ("convert p.safetensors out --to peft --backbone adapter", "no config.json"),
    ("convert adapter out.safetensors --to prefixtune --backbone model", "adapter_config.json"),
    ("export p.safetensors --to onx --output out", "'onx'"),
    ("export p.safetensors --to llama.cpp --output file", "is a file"),
    ("export p.safetensors --to llama.cpp --output out --baked", "--baked is for onnx"),
    ("export p.safetensors --to llama.cpp --output out --kv-type f8", "f8"),
    ("export p.safetensors --to llama.cpp --output out --state-version 9", "9"),
    ("export p.safetensors --to llama.cpp --output out --patch nowhere.bin", "nowhere.bin"),
    ("export nowhere.safetensors --to llama.cpp --output out", "there is no file"),
    ("export deep.safetensors --to llama.cpp --output out", "4 layers"),
    ("push nowhere.safetensors me/it", "there is no file"),
    ("push p.safetensors me/it --evaluation nowhere", "holds no scores"),
    ("pull me/it out.bin", "does not end with .safetensors"),
    ("pull me/it file/out.safetensors", "cannot write"),
    ("inspect rows.jsonl", "rows.jsonl"),
    # doctor, demo, prepare, serve
    ("doctor model --device gpu", "--device is 'gpu'"),
    ("doctor model --quantize int3", "must be one of 'int8', 'int4'"),
    ("doctor adapter", "no config.json"),
    ("demo --steps 0", "--steps is 0"),
    ("demo --output file", "holds other files than those of a demo"),
    ("demo --output file/demo", "cannot write"),
    ("prepare smollm3", "'smollm3'"),
    ("serve --backbone model --prefixes nowhere", "there is no folder"),
    ("serve --backbone model --port 99999", "99999"),
    ("serve --config nowhere.toml", "nowhere.toml"),
    ("worker --backbone model --prefixes nowhere", "there is no folder"),
    ("jobs list --url nowhere", "--url is 'nowhere'"),
    # study, report, score
    (STUDY + "--dev nowhere.jsonl --sizes 0", "nowhere.jsonl does not exist"),
    ("study length --backbone model --task toy --train train --dev held_out --sizes 0", "no test data"),
    ("study length --backbone model --task toy --train train --dev held_out --test held --sizes 0", "'held'"),
    ("study length --backbone model --task toy --train train --dev held_out --test held_out --sizes 999999", "999999"),
    (
        "study length --backbone adapter --task toy --train train --dev held_out --test held_out --sizes 0",
        "config.json",
    ),
    (
        "study length --backbone model --device gpu --task toy --train train --dev held_out --test held_out --sizes 0",
        "--device is 'gpu', but must be cpu, cuda",
    ),
    (
        "study length --backbone model --output file --task toy --train train --dev held_out --test held_out --sizes 0",
        "file",
    ),
    ("study lenght", "'lenght'"),
    ("report nowhere", "nowhere"),
    ("score --task e2e --hypotheses file --references nowhere.csv", "nowhere.csv"),
    ("tasks --jsn", "--jsn"),
    ("env --jsn", "--jsn"),
    ("data nowhere.jsonl --backbone model", "does not exist"),
    ("lm-eval --backbone model --tasks hellaswag --prefix nowhere.safetensors", "there is no file"),
    ("config schema sevre", "did you mean 'serve'?"),
    ("chat --prefix nowhere.safetensors", "there is no file"),
    ("chat --prefix labels.safetensors", "gives labels"),
    ("chat --top-p 2 --device gpu", "--device is 'gpu', but must be"),
    ("--install-completion --shell bsh", "must be one of 'bash', 'zsh', 'fish', 'powershell'"),
]


@pytest.mark.parametrize(("command", "message"), MISTAKES)
def test_a_mistake_is_reported_before_the_model_loads(
    command: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "error: " in err


def test_every_command_has_a_mistake_in_the_table() -> None:
    assert {command.split()[0] for command, _ in MISTAKES} == command_options().keys()


def test_several_mistakes_are_reported_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = TRAIN.replace("rows.jsonl", "nowhere.jsonl") + "--device gpu --dev lost.jsonl --prompt-format Say"
    assert main(command.split()) == 2
    err = capsys.readouterr().err
    for message in ("nowhere.jsonl does not exist", "lost.jsonl does not exist", "unknown device 'gpu'", "{source}"):
        assert message in err
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    "command",
    [
        "evaluate --prefix no.safetensors --data lost.jsonl",
        "evaluate --data no.jsonl --shots 1 --train lost.jsonl",
        "generate --prefix no.safetensors --prefix lost.safetensors x y",
        "generate --prefix no.safetensors --data lost.jsonl",
        "chat --prefix no.safetensors --prefix lost.safetensors",
        "explain no.safetensors --against lost.safetensors",
        "explain no.safetensors --data lost.jsonl",
        "data no.jsonl --test lost.jsonl",
    ],
)
def test_all_files_that_are_missing_are_named_at_once(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.split()) == 2
    err = capsys.readouterr().err
    assert "no." in err
    assert "lost." in err


@pytest.mark.parametrize(
    ("command", "option"),
    [("evaluate --data rows.jsonl", "--prefix"), ("evaluate --data rows.jsonl", "--run"), ("generate x", "--run")],
)
def test_an_empty_name_is_not_the_bare_model(
    command: str, option: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a variable of the shell that is not set: --prefix "$PREFIX"."""
    assert main([*command.split(), option, "", "--backbone", "model"]) == 2
    assert f"{option} is empty, but must name a file or a folder" in capsys.readouterr().err


def test_runs_that_share_a_backbone_are_checked_before_it_loads(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = 'backbone = "model"\nsource = "name"\ntarget = "text"\n'
    (folder / "a.toml").write_text(good + 'train = "rows.jsonl"\noutput = "a"\n')
    (folder / "b.toml").write_text(good + 'train = "nowhere.jsonl"\noutput = "b"\n')
    assert main(["train", "--together", "a.toml", "b.toml"]) == 2
    assert "nowhere.jsonl does not exist" in capsys.readouterr().err


def test_a_model_without_a_mistake_would_be_loaded(folder: Path) -> None:
    """The table's commands fail for the mistake in them, and for nothing else."""
    for command in (TRAIN, "generate --prefix p.safetensors x", "convert p.safetensors out --to peft --backbone model"):
        with pytest.raises(pytest.fail.Exception, match="the backbone was loaded"):
            main(command.split())


def test_train_says_that_it_loads_when_it_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--backbone", "model", "--source", "{name}", "--target", "text", "--device", "cpu"]
    assert main([*words, "--train", "nowhere.csv", "--output", "a"]) == 2
    assert "loading" not in capsys.readouterr().err
    (folder / "one.toml").write_text(
        'backbone = "model"\nsource = "{name}"\ntarget = "text"\ntrain = "nowhere.csv"\noutput = "one"\n'
    )
    (folder / "two.toml").write_text((folder / "one.toml").read_text().replace('"one"', '"two"'))
    assert main(["train", "--together", "one.toml", "two.toml"]) == 2
    assert "loading" not in capsys.readouterr().err

    def load(*_: Any, **__: Any) -> Any:
        raise ConfigError("it was about to load.")

    monkeypatch.setattr(prefixtune.training.opening, "load_backbone", load)
    for more, shown in (((), 1), (("--quiet",), 0), (("--json",), 0)):
        assert main([*words, "--train", "rows.jsonl", "--output", "b", *more]) == 2
        captured = capsys.readouterr().err
        assert captured.count("loading model ...") == shown
        assert "about to load" in captured


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["inspect", ""], ["PATH is empty"]),
        (
            ["compose", "p.safetensors", "nowhere.safetensors", "--output", "file/x.safetensors"],
            ["there is no file 'nowhere.safetensors'", "cannot write 'file/x.safetensors'"],
        ),
        (
            ["jobs", "create", "nowhere.jsonl", "--url", "foo", "--option", "b", "--epochs", "many", "--option", "c"],
            ["no file 'nowhere.jsonl'", "'foo'", "--option is 'b'", "--option is 'c'", "--epochs is 'many'"],
        ),
    ],
)
def test_mistakes_are_reported_together(
    words: list[str], messages: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    err = capsys.readouterr().err
    assert [message for message in messages if message not in err] == []
