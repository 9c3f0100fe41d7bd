"""Which runs may share a pass over one backbone."""

from __future__ import annotations

from typing import Any

import pytest

from prefixtune.errors import ConfigError
from prefixtune.training.checks import check_together
from prefixtune.training.config import TrainConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"adapter_rank": 2}, "the run in 'a' has an adapter, but"),
        ({"adapter_rank": 2, "train_adapter": True}, "the run in 'a' has an adapter, but"),
        ({"adapter": "folder"}, "the run in 'a' has an adapter, but"),
        ({"shard": True}, "shard is 'False' and 'True', but all runs share one backbone"),
        ({"dtype": "float32"}, "dtype is 'auto' and 'float32', but all runs share one backbone"),
    ],
)
def test_what_runs_cannot_share_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_together([TrainConfig(output="a", **values), TrainConfig(output="b")])


def test_adapters_are_refused_in_all_runs_alike() -> None:
    with pytest.raises(ConfigError, match="the run in 'b' has an adapter, but"):
        check_together([TrainConfig(output=name, adapter_rank=2) for name in ("a", "b")])
