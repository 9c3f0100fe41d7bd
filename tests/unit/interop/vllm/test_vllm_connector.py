"""What the connector refuses before vLLM serves anything."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from fake_vllm import import_connector, model_config, vllm_config
from prefixtune.errors import ConfigError


def test_an_old_vllm_is_refused_before_it_loads_the_model(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"0\.28\.0"):
        import_connector(monkeypatch, base=object, version="0.28.0")


def test_a_backend_that_cannot_fill_the_cache_is_refused_with_the_first_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = vllm_config(tmp_path)
    config.model_config = model_config(dtype="torch.float32", max_model_len=64)
    config.cache_config = SimpleNamespace(cache_dtype="auto", block_size=16)
    config.speculative_config = SimpleNamespace(method=None)
    config.parallel_config.decode_context_parallel_size = 1
    able, unable = SimpleNamespace(do_kv_cache_update=print), SimpleNamespace()
    layers = {"model.layers.0.attn": SimpleNamespace(impl=able), "model.layers.1.attn": SimpleNamespace(impl=able)}
    # Other layers, such as experts, have neither.
    config.compilation_config = SimpleNamespace(static_forward_context={**layers, "experts": SimpleNamespace()})
    module = import_connector(monkeypatch)
    connector = module.PrefixConnector(config, module.KVConnectorRole.SCHEDULER, None)
    connector.register_kv_caches(dict.fromkeys(layers))
    layers["model.layers.1.attn"].impl = unable
    with pytest.raises(ConfigError, match=r"the attention backend of 'model\.layers\.1\.attn'"):
        connector.register_kv_caches(dict.fromkeys(layers))
