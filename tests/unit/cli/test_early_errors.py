"""Mistakes that need no model are reported before one loads, by every command."""

import json

import pytest
import torch

import prefixtune.backbone.load
from patching import replace_everywhere
from prefixtune.cli.main import command_options, main
from prefixtune.prefix.prefix import Prefix, save_prefix

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with data, prefixes and what looks like a model; nobody may load it."""

    def loaded(*given, **more):
        pytest.fail("the backbone was loaded")

    replace_everywhere(monkeypatch, prefixtune.backbone.load.load_backbone, loaded)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA))
    rows = [{"name": name, "text": f"{name} eats."} for name in ("Ann", "Bo")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels = [{"text": name, "label": name} for name in ("Ann", "Bo")]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    (tmp_path / "cyrillic.jsonl").write_text(json.dumps({"question": "x", "answer": "\u0434\u0430"}))
    asked = {"question": "Who eats?", "answer": "Ann."}
    (tmp_path / "questions.jsonl").write_text(json.dumps(asked) + "\n")
    (tmp_path / "run.toml").write_text('backbone = "model"\ntrain = "nothere.jsonl"\n')
    (tmp_path / "file").write_text("no folder")
    pair = torch.zeros(2, 4, 8), torch.ones(2, 4, 8)
    for name, backbone in (("p", "model"), ("q", "other")):
        header = {"backbone": {"name": backbone, "kind": "decoder", "fingerprint": "a:b"}}
        save_prefix(tmp_path / f"{name}.safetensors", Prefix({"decoder": (pair,) * 3}, header))
    return tmp_path


TRAIN = "train --backbone model --train rows.jsonl --source name --target text --output run "
LABELS = "train --backbone model --task classification --train labels.jsonl --output run "
DISTILL = "distill --backbone model --document file --questions questions.jsonl --output run "
MISTAKES = [
    (TRAIN + "--init-prefix nowhere.safetensors", "nowhere.safetensors"),
    (TRAIN + "--init-text @nowhere.txt", "nowhere.txt"),
    (TRAIN + "--beside nowhere.safetensors", "nowhere.safetensors"),
    (TRAIN + "--chat-template nowhere.jinja", "nowhere.jinja"),
    (TRAIN + "--prompt-format tell", "tell"),
    (TRAIN + "--classifier head", "classifier"),
    (TRAIN + "--label-words Ann=yes", "label_words"),
    (TRAIN + "--method lora --keep-general 0.1", "keep_general"),
    (LABELS + "--label-words Cy=yes", "Cy"),
    (LABELS + "--keep-general 0.1", "keep_general"),
    (LABELS + "--method full --classifier head", "full"),
    (LABELS + "--examples 1 --classifier head", "examples"),
    ("train --together run.toml", "nothere.jsonl"),
    (DISTILL + "--init-prefix nowhere.safetensors --initialization prefix", "nowhere.safetensors"),
    (DISTILL + "--teacher p.safetensors", "p.safetensors"),
    (DISTILL + "--teacher ./nowhere", "nowhere"),
    (DISTILL + "--beside self", "beside"),
    (DISTILL + "--num-questions 9", "num_questions"),
    (DISTILL + "--questions self --limit 3", "limit"),
    ("generate --prefix p.safetensors --route x", "p.safetensors"),
    ("generate --backbone model --engine vllm --num-beams 2 x", "--num-beams"),
    ("evaluate --prefix p.safetensors --task classification --data labels.jsonl", "classification"),
    ("evaluate --backbone model --task classification --data labels.jsonl --intervals", "intervals"),
    ("evaluate --backbone model --data rows.jsonl --source name --target text --instruction {source}", "{source}"),
    ("evaluate --data labels.jsonl --outputs file --device cpu", "--device"),
    ("evaluate --data labels.jsonl --outputs=", "--outputs"),
    ("evaluate --backbone model --data rows.jsonl --source name --target text --split dev", "--split"),
    ("evaluate --backbone model --task classification --data labels.jsonl --seed 1", "--seed"),
    ("explain p.safetensors --data labels.jsonl --seed 18446744073709551616", "--seed"),
    ("explain p.safetensors --data rows.jsonl --split test", "--split"),
    ("train --backbone model --train rows.jsonl --output=", "--output"),
    ("evaluate --data labels.jsonl --outputs run/../run/outputs.jsonl --output run --limit 1", "--output"),
    ("evaluate --data rows.jsonl --outputs a.txt --against run/../run/outputs.jsonl --output run", "--against"),
    ("evaluate --prefix p.safetensors --prefix q.safetensors --data rows.jsonl", "--prefix"),
    ("evaluate --backbone model --data cyrillic.jsonl --metrics rouge_l", "ROUGE"),
    ("train --together nowhere.toml", "nowhere.toml"),
    (TRAIN + "--epochs -1 --seed x", "--epochs is '-1'"),
    ("generate --prefix p.safetensors --prefix q.safetensors x y", "different backbones"),
    ("generate --stream x y", "--stream"),
    ("generate --prefix p.safetensors --top-p 0.5 x", "--temperature"),
    ("chat --top-p 0.5", "--temperature"),
    ("generate ok a\udcffb", "TEXTS"),
    ("chat --prefix nowhere.safetensors", "nowhere.safetensors"),
    ("compose p.safetensors nowhere.safetensors --output new.safetensors", "nowhere.safetensors"),
    ("compose p.safetensors --length 1 --mode average --output new.safetensors", "--mode"),
    ("compose p.safetensors p.safetensors --from start --output new.safetensors", "--length"),
    ("distill --backbone model --document nowhere.txt --questions nothere.jsonl --output run", ".jsonl"),
    ("explain nowhere.safetensors --data nowhere.jsonl", "nowhere.safetensors"),
    ("length --backbone model --train rows.jsonl", "--dev"),
    ("export p.safetensors --to llama.cpp --output file/x", "file/x"),
    ("convert nowhere out.safetensors --to prefixtune", "nowhere"),
    ("push nowhere.safetensors me/x", "nowhere.safetensors"),
    ("inspect nowhere.safetensors", "nowhere.safetensors"),
    ("prepare gpt5", "gpt5"),
    ("doctor model --dtype bf16", "--dtype is 'bf16'"),
    ("demo --output file", "file"),
    ("serve --backbone model --prefixes nowhere", "nowhere"),
    ("worker --backbone model --prefixes nowhere", "nowhere"),
    ("jobs create nowhere.jsonl --url http://127.0.0.1:9/v1 --model m", "nowhere.jsonl"),
    ("jobs show ftjob-1 --name x", "--name"),
    ("jobs list --url http://here:abc/v1", "--url"),
    ("report nowhere", "nowhere"),
    ("env --jsn", "--json"),
    ("data nowhere.jsonl --backbone model", "nowhere.jsonl"),
    ("lm-eval --tsks x", "--tasks"),
    ("lm-eval --tasks x --prefix=", "--prefix"),
]


def test_a_mistake_is_reported_before_the_model_loads_and_leaves_no_file(folder, capsys):
    before = sorted(folder.iterdir())
    for command, named in MISTAKES:
        assert main(command.split()) == 2, command
        out, err = capsys.readouterr()
        assert out == "", command
        assert "error: " in err, command
        assert named in err, command
        assert sorted(folder.iterdir()) == before, command


def test_a_tracker_that_is_missing_is_named_before_the_model_loads(folder, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([*TRAIN.split(), "--report-to", "mlflow"]) == 2
    assert "mlflow" in capsys.readouterr().err


def test_every_command_has_a_mistake_in_the_table():
    assert {command.split()[0] for command, _ in MISTAKES} == command_options().keys()
