"""vLLM's connector: what it refuses before anything is served, how a request names a prefix, what a worker keeps."""

import enum
import importlib
import json
import shutil
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

from prefixtune.errors import CheckpointError, ConfigError
from prefixtune.interop.vllm import prefix_cache
from prefixtune.interop.vllm.model import check_kv_cache, geometry_of, heads_of_rank
from prefixtune.interop.vllm.prefix_cache import PrefixCache
from prefixtune.prefix.folder import PrefixReference, path_of
from prefixtune.prefix.geometry import LayerShape
from prefixtune.prefix.prefix import Prefix, read_artifact, save_prefix

SHAPES = (LayerShape(2, 8, 8),) * 3


def model_config(**changes):
    """vLLM's ModelConfig of a tiny LLaMA."""
    facts = {
        "model": "tiny",
        **dict.fromkeys(("is_encoder_decoder", "use_mla", "is_hybrid", "is_attention_free"), False),
        "is_multimodal_model": False,
        "get_head_size": lambda: 8,
        "get_total_num_kv_heads": lambda: 2,
        "get_total_num_hidden_layers": lambda: 3,
        "hf_text_config": SimpleNamespace(tie_word_embeddings=False),
        "dtype": "torch.bfloat16",
        "max_model_len": 256,
    }
    return SimpleNamespace(**{**facts, **changes})


def vllm_config(folder, policy="fail", *, dtype="auto", drafts=None, pipeline=1, **extra):
    """vLLM's VllmConfig, as far as the connector reads it."""
    options = {"prefixes": str(folder), **extra}
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_connector_extra_config=options, kv_load_failure_policy=policy),
        model_config=model_config(),
        cache_config=SimpleNamespace(cache_dtype=dtype, block_size=16),
        speculative_config=SimpleNamespace(method=drafts),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, pipeline_parallel_size=pipeline),
    )


class ConnectorBase:
    """vLLM's base class of connectors."""

    def __init__(self, config, role, kv_cache_config):
        self._vllm_config = config

    def bind_kv_cache_manager(self, manager):
        """What versions that are too old do not have."""


def import_connector(patch, base=ConnectorBase):
    """The connector, as a vLLM with that base class imports it."""
    connector = "prefixtune.interop.vllm.connector"
    names = {
        "vllm": {"__version__": "0.32.0"},
        "vllm.logger": {"init_logger": lambda name: None},
        "vllm.distributed.kv_transfer.kv_connector.v1.base": {
            "KVConnectorBase_V1": base,
            "KVConnectorMetadata": type("KVConnectorMetadata", (), {}),
            "KVConnectorRole": enum.Enum("KVConnectorRole", "SCHEDULER WORKER"),
        },
    }
    for name, contents in names.items():
        module = ModuleType(name)
        module.__dict__.update(contents)
        patch.setitem(sys.modules, name, module)
    patch.delitem(sys.modules, connector, raising=False)
    try:
        return importlib.import_module(connector)
    finally:
        # The next test imports it anew.
        sys.modules.pop(connector, None)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "ranks"), [(8, 2), (2, 4), (3, 3)])
def test_ranks_divide_all_heads(heads, ranks):
    shares = [list(range(heads))[heads_of_rank(heads, ranks, rank)] for rank in range(ranks)]
    assert sorted({head for share in shares for head in share}) == list(range(heads))
    assert len({len(share) for share in shares}) == 1
    # Query heads are distributed in order, and each must meet its own KV head.
    assert [share[0] for share in shares] == [rank * heads // ranks for rank in range(ranks)]


def test_heads_that_cannot_be_divided():
    with pytest.raises(ConfigError):
        heads_of_rank(3, 2, 0)


@pytest.mark.deploys(
    "vLLM",
    "at the start, with the reason",
    model="encoder-decoders, latent attention, hybrids, multimodal",
    refused=True,
)
@pytest.mark.parametrize("fact", ["is_encoder_decoder", "is_multimodal_model"])
def test_models_that_cannot_carry_a_prefix_are_refused(fact):
    assert geometry_of(model_config()) == {"decoder": SHAPES}
    with pytest.raises(ConfigError):
        geometry_of(model_config(**{fact: True}))


FULL, WINDOW = SimpleNamespace(), SimpleNamespace(sliding_window=255)


def cache_of(*specs):
    """vLLM's configuration of a KV cache: one group of layers for each."""
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in specs])


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({"dtype": "fp8"}, [FULL]),
        ({}, [FULL, FULL]),
        ({}, [SimpleNamespace(kv_cache_specs={"0": FULL, "1": WINDOW})]),
        ({"drafts": "eagle"}, [FULL]),
        ({"pipeline": 2}, [FULL]),
    ],
)
def test_caches_that_would_lose_a_prefix_are_refused(options, groups):
    with pytest.raises(ConfigError):
        check_kv_cache(vllm_config("", **options), cache_of(*groups))


@pytest.mark.parametrize(
    "spec", [FULL, SimpleNamespace(sliding_window=256), SimpleNamespace(attention_chunk_size=4096)]
)
def test_a_window_that_holds_every_position_hides_nothing(spec):
    check_kv_cache(vllm_config("", dtype="bfloat16", drafts="ngram"), cache_of(spec))


LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 4096}


def test_keys_that_turn_otherwise_in_a_longer_context_are_refused():
    config = SimpleNamespace(rope_parameters={"full_attention": LONGROPE, "sliding_attention": {}})
    geometry_of(model_config(hf_text_config=config, max_model_len=4096))
    with pytest.raises(ConfigError):
        geometry_of(model_config(hf_text_config=config, max_model_len=4097))


def test_an_old_vllm_is_refused_before_it_loads_the_model(monkeypatch):
    with pytest.raises(ConfigError):
        import_connector(monkeypatch, base=object)


@pytest.mark.parametrize("wrong", [{"cach": 1}, {"policy": "recompute"}, {"folder": "none"}])
def test_wrong_options_are_refused(wrong, tmp_path, monkeypatch):
    module = import_connector(monkeypatch)
    config = vllm_config(**{"folder": tmp_path, **wrong})
    with pytest.raises(ConfigError):
        module.PrefixConnector(config, module.KVConnectorRole.SCHEDULER, None)


def test_a_backend_that_cannot_fill_the_cache_is_refused(tmp_path, monkeypatch):
    config, able = vllm_config(tmp_path), SimpleNamespace(do_kv_cache_update=print)
    layers = {f"model.layers.{index}.attn": SimpleNamespace(impl=able) for index in range(2)}
    # Other layers, such as experts, have neither.
    config.compilation_config = SimpleNamespace(static_forward_context={**layers, "experts": SimpleNamespace()})
    module = import_connector(monkeypatch)
    connector = module.PrefixConnector(config, module.KVConnectorRole.SCHEDULER, None)
    connector.register_kv_caches(dict.fromkeys(layers))
    layers["model.layers.1.attn"].impl = SimpleNamespace()
    with pytest.raises(ConfigError):
        connector.register_kv_caches(dict.fromkeys(layers))


@pytest.mark.parametrize(("skips", "fields"), [(False, {}), (True, {}), (True, {"kv_transfer_params": None})])
def test_what_reads_no_cache_cannot_leave_placeholders_in_it(tmp_path, monkeypatch, skips, fields):
    module, reference = import_connector(monkeypatch), PrefixReference("pubs", "0a" * 32, 20)
    connector = module.PrefixConnector(vllm_config(tmp_path), module.KVConnectorRole.SCHEDULER, None)
    named = {**reference.request_fields, **fields}
    request = SimpleNamespace(num_tokens=40, skip_reading_prefix_cache=skips, **named)
    # vLLM does not ask for the positions of one that skips.
    asked = 0 if skips else connector.get_num_new_matched_tokens(request, 0)[0]
    connector.update_state_after_alloc(request, SimpleNamespace(get_block_ids=lambda: [[4, 7, 9]]), asked)
    (load,) = connector.build_connector_meta(None).loads
    assert (load.start, bool(load.fault)) == (0, skips)
    assert load.blocks == ([4] if fields else [4, 7])
    evicted = []
    connector._kv_cache_manager = SimpleNamespace(evict_blocks=evicted.append)
    connector.update_connector_output(SimpleNamespace(invalid_block_ids=set(load.blocks) if load.fault else set()))
    assert evicted == ([{4, 7, 9}] if skips else [])


# --- references -------------------------------------------------------------------------------------------------------


def test_a_request_names_one_prefix_with_its_salt():
    reference = PrefixReference("pubs", "0a" * 32, 10)
    sent = json.loads(json.dumps(reference.request_fields))
    params, salt = sent["kv_transfer_params"], sent["cache_salt"]
    assert PrefixReference.of_request(params, salt) == reference
    for bare in (None, {}, 3, {"other": 1}):
        assert PrefixReference.of_request(bare, None) is None
        assert PrefixReference.of_request(bare, "a client's own") is None
    deep = []
    for _ in range(10_000):
        deep = [deep]
    fields = params["prefixtune"]
    wrong = [
        (params, None),
        (params, "own"),
        # It would leave its blocks to the requests of that prefix.
        (None, salt),
        ({"prefixtune": {**fields, "sha256": "0b" * 32}}, salt),
        *(
            ({"prefixtune": value}, salt)
            for value in (
                *(3, None, {}, deep, {**fields, "name": "../pubs"}, {**fields, "name": "pubs\n"}),
                *({**fields, "length": 0}, {**fields, "more": 1}, {**fields, "sha256": "\ud800"}),
            )
        ),
    ]
    for one, other in wrong:
        found = PrefixReference.of_request(one, other)
        assert found.fault


# --- a worker's prefixes ----------------------------------------------------------------------------------------------


@pytest.fixture
def make(tmp_path):
    """Store a random prefix of 5 positions in the folder."""

    def store(name, seed=0):
        generator = torch.Generator().manual_seed(seed)
        layers = tuple(
            (torch.randn(2, 5, 8, generator=generator), torch.randn(2, 5, 8, generator=generator)) for _ in SHAPES
        )
        header = {"backbone": {"name": "tiny", "fingerprint": "1:2", "kind": "decoder"}}
        return PrefixReference.of_file(
            save_prefix(tmp_path / f"{name}.safetensors", Prefix({"decoder": layers}, header))
        )

    return store


def cache_in(folder, max_bytes=2**20, heads=slice(0, 1)):
    return PrefixCache(folder, max_bytes, SHAPES, heads, torch.device("cpu"), torch.bfloat16)


def test_a_worker_gets_its_own_heads(make, tmp_path):
    reference = make("pubs")
    pairs = cache_in(tmp_path).get(reference)
    stored = read_artifact(path_of(tmp_path, reference.name)).layers["decoder"]
    for pair, tensors in zip(pairs, stored, strict=True):
        for part, tensor in zip(pair, tensors, strict=True):
            assert torch.equal(part, tensor[:1].transpose(0, 1).to(torch.bfloat16))


def test_prefixes_used_last_are_kept(make, tmp_path, monkeypatch):
    references = {name: make(name, seed) for seed, name in enumerate(("pubs", "trains", "ships"))}
    reads = []

    def read(path):
        reads.append(path)
        return read_artifact(path)

    monkeypatch.setattr(prefix_cache, "read_artifact", read)
    # Room for two: 3 layers of keys and values, 5 positions of 8 numbers in bfloat16.
    cache = cache_in(tmp_path, 2 * 3 * 2 * 5 * 8 * 2)
    cache.get(references["pubs"])
    for name, num_reads in (("trains", 2), ("pubs", 2), ("ships", 3), ("pubs", 3), ("trains", 4)):
        cache.get(references[name])
        assert len(reads) == num_reads, name


def test_a_prefix_under_another_name_is_the_same(make, tmp_path, monkeypatch):
    cache, one = cache_in(tmp_path), make("pubs")
    cache.get(one)
    monkeypatch.setattr(PrefixCache, "_read", None)
    shutil.copy(path_of(tmp_path, "pubs"), path_of(tmp_path, "copy"))
    cache.get(replace(one, name="copy"))


def test_a_wrong_file_is_read_once_until_it_changes(make, tmp_path, monkeypatch):
    right, reads, hash_file = make("pubs", seed=1), [], prefix_cache.hash_file
    make("pubs", seed=2)
    monkeypatch.setattr(prefix_cache, "hash_file", lambda path: (reads.append(path), hash_file(path))[1])
    cache = cache_in(tmp_path)
    for sha256 in (right.sha256, right.sha256, "0a" * 32):
        with pytest.raises(CheckpointError):
            cache.get(replace(right, sha256=sha256))
    assert len(reads) == 1
    make("pubs", seed=1)
    cache.get(right)


def test_files_that_cannot_be_used(make, tmp_path):
    reference = make("pubs")
    with pytest.raises(CheckpointError):
        cache_in(tmp_path).get(replace(reference, length=6))
    make("pubs", seed=1)
    with pytest.raises(CheckpointError):
        cache_in(tmp_path).get(reference)
    path_of(tmp_path, reference.name).unlink()
    with pytest.raises(OSError, match="pubs"):
        cache_in(tmp_path).get(reference)
    other = PrefixCache(tmp_path, 2**20, SHAPES[:2], slice(0, 1), torch.device("cpu"), torch.float32)
    shutil.copy(path_of(tmp_path, make("trains").name), tmp_path / "copy.safetensors")
    with pytest.raises(CheckpointError):
        other.get(PrefixReference.of_file(tmp_path / "copy.safetensors"))
