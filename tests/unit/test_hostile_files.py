"""Files that a fuzzer made up and that once ended in a traceback; errors that quote what anybody wrote."""

import pytest

from prefixtune.engine.config import EngineConfig
from prefixtune.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    PrefixError,
    RequestError,
    describe_value,
    short_repr,
)
from prefixtune.report import read_results
from prefixtune.server.settings import ServeConfig
from prefixtune.training.config import TrainConfig
from prefixtune.training.run_folder import read_events


@pytest.mark.parametrize("sign", ["", "-"])
def test_a_number_that_is_too_large_for_its_field(sign, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(f"learning_rate = {sign}{'9' * 400}\n")
    with pytest.raises(ConfigError, match="learning_rate"):
        TrainConfig.from_file(path)


@pytest.mark.parametrize("value", [2**63, -(10**400)])
@pytest.mark.parametrize("kind", [TrainConfig, ServeConfig, EngineConfig])
def test_a_whole_number_has_a_bound(kind, value):
    field = {TrainConfig: "batch_size", ServeConfig: "port", EngineConfig: "num_slots"}[kind]
    with pytest.raises(ConfigError, match=field):
        kind(**{field: value})


@pytest.mark.parametrize("field", ["prompt_format", "output", "train"])
def test_half_a_character_is_no_value_of_a_configuration(field):
    with pytest.raises(ConfigError, match=field):
        TrainConfig(**{field: "\ud800"})


@pytest.mark.parametrize("step", ["1e999", "NaN", '"x"', "null", "[" * 5000])
def test_a_log_with_a_step_that_is_none(step, tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text(f'{{"event": "step", "step": {step}}}\n{{"event": "step", "step": 2}}\n')
    with pytest.raises(CheckpointError, match="line 1"):
        read_events(path, 3)


def test_half_a_character_is_no_text(tiny_backbone):
    with pytest.raises(RequestError, match="text 2"):
        tiny_backbone("llama").encode_sources(["good", "a\udcffb"])


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 5000])
def test_a_folder_that_no_report_can_be_made_of(value, tmp_path):
    (tmp_path / "evaluation.json").write_text(f'{{"scores": {value}}}')
    with pytest.raises(DataError, match=r"evaluation\.json"):
        read_results(tmp_path)
    (tmp_path / "evaluation.json").unlink()
    (tmp_path / "events.jsonl").write_text("\n")
    (tmp_path / "config.toml").write_text(f"seed = {value}\n")
    with pytest.raises(DataError, match=r"config\.toml"):
        read_results(tmp_path)


@pytest.mark.parametrize("quoted", ["a\nerror: forged", "\x1b[2J", "\ud800", "\u2028", "x" * 500_000])
def test_an_error_is_one_printable_line_whatever_it_quotes(quoted):
    error = PrefixError(f"the file is for {quoted}.", hint=f"get {quoted} again.")
    for text in (error.message, error.hint, str(error), error.args[0]):
        assert text.isprintable()
        assert len(text) < 10_000
    assert short_repr(quoted).isprintable()
    assert len(short_repr(quoted)) <= 60
    assert len(describe_value(quoted)) <= 80


def test_a_number_that_python_refuses_to_write():
    assert short_repr(10**5000)
    assert describe_value(10**5000)
