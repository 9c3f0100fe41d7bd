"""The environment that says how many processes train together; tests of real ones are in tests/e2e."""

import pytest

from prefixtune.errors import ConfigError
from prefixtune.training.distributed import SINGLE_PROCESS, init_distributed

NAMES = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"},
        {"WORLD_SIZE": "two"},
        {"WORLD_SIZE": "0"},
    ],
)
def test_an_environment_that_is_incomplete_is_named(environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="WORLD_SIZE"), init_distributed("cpu"):
        pass


@pytest.mark.parametrize("size", ["", "1"])
def test_a_process_may_be_the_only_one(size, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", size)
    with init_distributed("cpu") as processes:
        assert processes is SINGLE_PROCESS
