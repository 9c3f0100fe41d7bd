"""The device that a backbone is loaded on, and the dtype that `auto` means there."""

import pytest
import torch

from prefixtune.backbone import devices
from prefixtune.backbone.devices import choose_device, choose_dtype
from prefixtune.errors import ConfigError


@pytest.mark.parametrize(("cuda", "mps", "chosen"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_auto_takes_what_there_is(cuda, mps, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device("auto") == torch.device(chosen)
    if mps:
        assert choose_device("mps") == torch.device("mps")
    else:
        with pytest.raises(ConfigError):
            choose_device("mps")


@pytest.mark.parametrize("device", ["meta", "cuda:2", "no such"])
def test_devices_that_are_not_there(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ConfigError):
        choose_device(device)


@pytest.mark.parametrize("real", [True, False])
def test_bfloat16_is_taken_only_where_it_is_real(real, monkeypatch):
    expected = torch.bfloat16 if real else torch.float32
    # A card that emulates bfloat16 says yes unless it is asked about that.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or real)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": real, "avx512_f": True}, raising=False)
    monkeypatch.setattr(devices, "BFLOAT16_FEATURES", ("avx512_bf16",))
    assert choose_dtype("auto", torch.device("cuda")) == expected
    assert choose_dtype("auto", torch.device("cpu")) == expected
    assert choose_dtype("auto", torch.device("mps")) == torch.float32
    assert choose_dtype("float16", torch.device("cpu")) == torch.float16
    with pytest.raises(ConfigError):
        choose_dtype("bf16", torch.device("cpu"))
