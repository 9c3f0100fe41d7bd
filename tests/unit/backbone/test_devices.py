"""The device that a backbone is loaded on."""

from __future__ import annotations

import pytest
import torch

from prefixtune.backbone.devices import choose_device
from prefixtune.errors import ConfigError
from prefixtune.training.config import TrainConfig


@pytest.mark.parametrize(
    ("cuda", "mps", "chosen"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_what_there_is(cuda: bool, mps: bool, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device("auto") == torch.device(chosen)
    if mps:
        assert choose_device("mps") == torch.device("mps")
    else:
        with pytest.raises(ConfigError, match="device is 'mps', but this machine has no MPS"):
            choose_device("mps")
    assert TrainConfig(device="mps").device == "mps"
