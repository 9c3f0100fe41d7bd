"""`prefixtune train`: where its configuration comes from, and mistakes in each source."""

import tomllib

import pytest

from command_line import call
from prefixtune.cli.commands.train import TrainOptions
from prefixtune.errors import CheckpointError
from prefixtune.training.config import TrainConfig
from prefixtune.training.presets import preset


def printed(capsys, *arguments):
    assert call("train", "--print-config", *arguments) == 0
    return TrainConfig(**tomllib.loads(capsys.readouterr().out))


def test_options_win_over_the_file_and_the_file_over_the_preset(tmp_path, capsys):
    (tmp_path / "run.toml").write_text('task = "e2e"\nlearning_rate = 1e-4\nseed = 3\nshard = true\n')
    arguments = ("--config", tmp_path / "run.toml", "--preset", "paper", "--seed", "5", "--no-shard")
    values = preset("paper", "e2e") | {"task": "e2e", "learning_rate": 1e-4, "seed": 5}
    assert printed(capsys, *arguments) == TrainConfig(**values)
    assert printed(capsys, "--init-examples", "0") == TrainConfig()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--hold-out 0", {"hold_out": 0.0, "patience": 0, "init_examples": 2}),
        ("--initialization text --prefix-length 5", {"init_examples": 0, "prefix_length": 5}),
        ("--initialization text", {"init_examples": 0, "prefix_length": 10}),
        ("--init-text Hello", {"initialization": "words", "init_examples": 0, "prefix_length": 64}),
        ("--initialization examples", {"init_examples": 2, "prefix_length": 64}),
        ("--init-prefix p.safetensors", {"initialization": "prefix", "init_examples": 0, "prefix_length": 0}),
    ],
)
def test_a_preset_gives_way_to_what_the_user_gives(options, expected, capsys):
    config = printed(capsys, "--train", "some.jsonl", "--preset", "quick", *options.split())
    assert {name: getattr(config, name) for name in expected} == expected


def test_what_an_option_implies_is_not_over_the_files_of_runs_together():
    assert TrainOptions.read({"together": ["a"], "init_examples": "2"}).given(TrainConfig) == {"init_examples": 2}


def test_a_resumed_run_has_its_own_configuration(tmp_path, capsys):
    config = TrainConfig(output=str(tmp_path), prefix_length=3)
    (tmp_path / "config.toml").write_text(config.to_toml())
    (tmp_path / "state.safetensors").touch()
    resumed = printed(capsys, "--resume", "--output", tmp_path, "--max-steps", "9")
    assert resumed == config.replace(max_steps=9)
    with pytest.raises(CheckpointError, match="nowhere"):
        call("train", "--resume", "--output", tmp_path / "nowhere")
