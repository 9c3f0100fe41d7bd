"""What the plugin reads of the model that vLLM runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fake_vllm import model_config
from prefixtune.backbone.load import load_backbone
from prefixtune.errors import ConfigError
from prefixtune.interop.vllm.model import check_kv_cache, geometry_of, heads_of_rank, sample_checkpoint
from prefixtune.prefix.geometry import LayerShape

Make = Callable[..., Any]


@pytest.mark.parametrize(("heads", "ranks"), [(8, 1), (8, 2), (8, 8), (2, 4), (1, 2), (3, 3)])
def test_ranks_divide_all_heads(heads: int, ranks: int):
    shares = [list(range(heads))[heads_of_rank(heads, ranks, rank)] for rank in range(ranks)]
    assert sorted({head for share in shares for head in share}) == list(range(heads))
    assert len({len(share) for share in shares}) == 1
    # Query heads are distributed in order, and each must meet its own KV head.
    queries = [rank * heads // ranks for rank in range(ranks)]
    assert [share[0] for share in shares] == queries


def test_heads_that_cannot_be_divided():
    with pytest.raises(ConfigError, match="3 KV heads"):
        heads_of_rank(3, 2, 0)


@pytest.mark.deploys(
    "vLLM",
    "at the start, with the reason",
    model="encoder-decoders, latent attention, hybrids, multimodal",
    refused=True,
)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"use_mla": True}, "latent"),
        ({"is_hybrid": True}, "not all of its layers"),
        ({"is_multimodal_model": True}, "more than text"),
    ],
)
def test_models_that_cannot_carry_a_prefix_are_refused(change: dict[str, bool], reason: str):
    assert geometry_of(model_config()) == {"decoder": (LayerShape(2, 8, 8),) * 3}
    with pytest.raises(ConfigError, match=reason):
        geometry_of(model_config(**change))


@pytest.mark.parametrize("tied", [False, True])
def test_weights_on_disk_are_sampled_as_in_memory(tied: bool, tiny_models: Make, tiny_tokenizer: Any, tmp_path: Path):
    tiny_models("llama", tie_word_embeddings=tied).save_pretrained(tmp_path, max_shard_size="20KB")
    tiny_tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    fingerprint = load_backbone(tmp_path, dtype="float32", device="cpu").fingerprint
    assert sample_checkpoint(tmp_path) == fingerprint.partition(":")[2]
    assert sample_checkpoint(tmp_path / "none") is None
    # Of files that were not written as they are loaded nothing can be said.
    config = json.loads((tmp_path / "config.json").read_text())
    for change in ({"transformers_version": "4.50.0"}, {"quantization_config": {}}, {"num_local_experts": 2}):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        assert sample_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    ("dtype", "specs", "drafts", "reason"),
    [
        ("fp8", [SimpleNamespace()], None, "fp8"),
        ("auto", [SimpleNamespace(), SimpleNamespace()], None, "sliding window"),
        ("auto", [SimpleNamespace(sliding_window=64)], None, "sliding window"),
        ("auto", [SimpleNamespace(attention_chunk_size=64)], None, "in chunks"),
        ("auto", [SimpleNamespace()], "eagle", "a model of its own (eagle)"),
    ],
)
def test_caches_that_would_lose_a_prefix_are_refused(dtype: str, specs: list[Any], drafts: str | None, reason: str):
    config = SimpleNamespace(
        model_config=model_config(dtype="torch.bfloat16"),
        cache_config=SimpleNamespace(cache_dtype=dtype),
        speculative_config=SimpleNamespace(method=drafts),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
    )
    groups = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in specs])
    with pytest.raises(ConfigError, match=re.escape(reason)):
        check_kv_cache(config, groups)
    config.cache_config.cache_dtype, config.speculative_config.method = "bfloat16", "ngram"
    check_kv_cache(config, SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=SimpleNamespace())]))
