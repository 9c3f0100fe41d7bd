"""The connector's options are checked, all at once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from fake_vllm import vllm_config
from prefixtune.errors import ConfigError
from prefixtune.interop.vllm.settings import Settings


def test_settings_come_from_one_place(tmp_path: Path):
    settings = Settings.from_vllm(vllm_config(tmp_path, cache_mib=2))
    assert (settings.prefixes, settings.cache_bytes, settings.secret) == (tmp_path, 2**21, b"drawn")
    assert Settings.from_vllm(vllm_config(tmp_path, secret="own")).secret == b"own"


@pytest.mark.parametrize("several", [{"data_parallel_size": 2}, {"data_parallel_size": 1, "_api_process_count": 2}])
def test_several_processes_share_a_secret(several: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = vllm_config(tmp_path)
    config.parallel_config = SimpleNamespace(**several)
    with pytest.raises(ConfigError, match="one secret"):
        Settings.from_vllm(config)
    monkeypatch.setenv("PREFIXTUNE_VLLM_SECRET", "shared")
    assert Settings.from_vllm(config).secret == b"shared"


def test_all_wrong_settings_are_reported(tmp_path: Path):
    more = {"raw_completions": 1, "max_joined_prefixes": 0, "on_too_long": "ignore"}
    with pytest.raises(ConfigError, match="kv_load_failure_policy"):
        Settings.from_vllm(vllm_config(tmp_path, "recompute"))
    wrong = vllm_config(tmp_path / "none", cache_mib=0, cach=1, **more)
    with pytest.raises(ConfigError) as caught:
        Settings.from_vllm(wrong)
    for name in ("cach", "prefixes", "cache_mib", "max_joined_prefixes", "on_too_long"):
        assert name in caught.value.message
