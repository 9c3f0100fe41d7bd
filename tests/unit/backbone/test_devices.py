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


@pytest.mark.parametrize("device", ["xpu", "hpu:0", "meta", "vulkan"])
def test_devices_that_are_not_supported(device: str) -> None:
    with pytest.raises(ConfigError, match=f"device is '{device}', which is not supported") as error:
        choose_device(device)
    assert error.value.hint == "use cpu, cuda, cuda:0, mps or auto."


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ConfigError, match="device is 'cuda:2', but this machine's last one is 'cuda:1'"):
        choose_device("cuda:2")
