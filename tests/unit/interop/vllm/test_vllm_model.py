"""What the plugin reads of the model that vLLM runs."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from fake_vllm import model_config
from prefixtune.errors import ConfigError
from prefixtune.interop.vllm.model import (
    check_kv_cache,
    geometry_of,
    heads_of_rank,
)
from prefixtune.prefix.geometry import LayerShape


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


def cache_of(*groups: Any, dtype: str = "auto", drafts: str | None = None) -> tuple[Any, Any]:
    """vLLM's configurations of a model with 256 positions, and of its KV cache: one group of layers for each."""
    config = SimpleNamespace(
        model_config=model_config(dtype="torch.bfloat16", max_model_len=256),
        cache_config=SimpleNamespace(cache_dtype=dtype),
        speculative_config=SimpleNamespace(method=drafts),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
    )
    return config, SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in groups])


FULL, WINDOW, CHUNKS = (
    SimpleNamespace(),
    SimpleNamespace(sliding_window=255),
    SimpleNamespace(attention_chunk_size=128),
)


@pytest.mark.parametrize(
    ("dtype", "groups", "drafts", "reason", "hint"),
    [
        ("fp8", [FULL], None, "fp8", ""),
        ("auto", [FULL, FULL], None, "caches of several kinds", ""),
        ("auto", [WINDOW], None, "a sliding window of 255 positions", "--max-model-len 255 (--disable-sliding-window"),
        ("auto", [SimpleNamespace(kv_cache_specs={"0": FULL, "1": WINDOW})], None, "a sliding window of 255", ""),
        ("auto", [CHUNKS], None, "in chunks of 128 positions", "--max-model-len 128, or"),
        ("auto", [FULL], "eagle", "a model of its own (eagle)", ""),
    ],
)
def test_caches_that_would_lose_a_prefix_are_refused(
    dtype: str, groups: list[Any], drafts: str | None, reason: str, hint: str
):
    with pytest.raises(ConfigError, match=re.escape(reason)) as caught:
        check_kv_cache(*cache_of(*groups, dtype=dtype, drafts=drafts))
    assert hint in caught.value.hint
    assert "--engine embedded" in caught.value.hint


@pytest.mark.parametrize(
    "spec", [FULL, SimpleNamespace(sliding_window=256), SimpleNamespace(attention_chunk_size=4096)]
)
def test_a_window_that_holds_every_position_hides_nothing(spec: Any):
    check_kv_cache(*cache_of(spec, dtype="bfloat16", drafts="ngram"))


LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 4096}


@pytest.mark.parametrize("settings", [LONGROPE, {"full_attention": LONGROPE, "sliding_attention": {}}])
def test_keys_that_turn_otherwise_in_a_longer_context_are_refused(settings: dict[str, Any]):
    config = SimpleNamespace(rope_parameters=settings)
    geometry_of(model_config(hf_text_config=config, max_model_len=4096))
    with pytest.raises(ConfigError, match="with more than 4,096 positions") as caught:
        geometry_of(model_config(hf_text_config=config, max_model_len=4097))
    assert "--max-model-len 4096" in caught.value.hint
