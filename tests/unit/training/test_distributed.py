"""The environment that says how many processes train together; tests of real ones are in tests/e2e."""

from __future__ import annotations

import pytest

from prefixtune.errors import ConfigError
from prefixtune.training.distributed import init_distributed


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}, "MASTER_PORT"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE"),
    ],
)
def test_an_environment_that_is_incomplete_is_named(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message), init_distributed("cpu"):
        pass
