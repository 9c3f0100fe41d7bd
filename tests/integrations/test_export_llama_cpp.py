"""Exported prefixes in a real llama.cpp (wheels that hold it compiled): logits and tokens are those of `generate`.

Tiny random models, written as float GGUF files here, so that nothing but the prefix can differ.
"""

import json
import shutil
import struct
import threading
import time
import urllib.request

import numpy as np
import pytest
import torch

from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.prefixes import load_prefix, make_header
from prefixtune.engine.llama_cpp import LlamaCppEngine
from prefixtune.engine.llama_state import KV_TYPES, encode_file, placeholders_for, rows_of
from prefixtune.engine.request import Request, SamplingParams
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate, generate_ids
from prefixtune.interop.llama_cpp.export import export_llama_cpp
from prefixtune.prefix.compose import concatenate, cut
from prefixtune.prefix.prefix import Prefix, save_prefix
from zoo import MAX_POSITIONS, store_model

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gpt2": "gpt2"}
"""Model type -> what llama.cpp calls it."""

CHANGES = {"mistral": {"sliding_window": None}}

GELU = 5e-3
"""llama.cpp looks GPT-2's GELU up in a table of half precision: its logits are so far off without a prefix, too."""


def write_gguf(path, model, tokenizer):
    """A float GGUF file of a tiny model, as llama.cpp's converter would write it."""
    import gguf

    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", 4 * config.hidden_size))
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    if architecture == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(size)
    special = set(tokenizer.all_special_ids)
    kinds = [gguf.TokenType.CONTROL if n in special else gguf.TokenType.NORMAL for n in range(len(tokenizer))]
    writer.add_vocab_size(len(tokenizer))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
    writer.add_token_types([int(kind) for kind in kinds])
    # llama.cpp wants at least one; its product is no token, so that it is never used.
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(True)
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if architecture == "llama" and "q_proj" in name:
            tensor = interleave(tensor, heads)
        elif architecture == "llama" and "k_proj" in name:
            tensor = interleave(tensor, kv_heads)
        elif architecture == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.T
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def interleave(weight, heads):
    """Rows of each head: first half and second half alternate."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return torch.stack([halves[:, 0], halves[:, 1]], dim=2).reshape(weight.shape)


_kept = []


class Runtime:
    """A context of llama.cpp through its C interface."""

    def __init__(self, path, *, kv_type=0, flash=False, sequences=1, unified=False):
        bindings = pytest.importorskip(
            "llama_cpp_py_sync._cffi_bindings", reason="llama-cpp-py-sync is installed on Linux (x86_64) only"
        )
        self.lib, self.ffi = bindings.get_lib(), bindings.get_ffi()
        if not _kept:
            _kept.append(self.ffi.callback("void(enum ggml_log_level, const char *, void *)", lambda *_: None))
        self.lib.llama_log_set(_kept[0], self.ffi.NULL)
        self.lib.llama_backend_init()
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), self.lib.llama_model_default_params())
        assert self.model != self.ffi.NULL
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = MAX_POSITIONS * sequences, sequences, unified
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = kv_type
        params.flash_attn_type = int(flash)
        self.context = self.lib.llama_init_from_model(self.model, params)
        assert self.context != self.ffi.NULL
        self.vocabulary = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))

    def close(self):
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def clear(self):
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def copy(self, source, sequence):
        """Let a sequence have the positions of another one, too."""
        self.lib.llama_memory_seq_cp(self.lib.llama_get_memory(self.context), source, sequence, -1, -1)

    def drop(self, count):
        """Remove the first positions of a sequence, and move the others there."""
        memory = self.lib.llama_get_memory(self.context)
        assert self.lib.llama_memory_seq_rm(memory, 0, 0, count)
        self.lib.llama_memory_seq_add(memory, 0, count, -1, -count)

    def decode(self, ids, position, sequence=0):
        """The logits of tokens from a position on, (T, vocabulary)."""
        batch = self.lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for number, token in enumerate(ids):
            batch.token[number], batch.pos[number] = token, position + number
            batch.n_seq_id[number], batch.seq_id[number][0], batch.logits[number] = 1, sequence, 1
        assert self.lib.llama_decode(self.context, batch) == 0
        raw = self.ffi.buffer(self.lib.llama_get_logits(self.context), 4 * self.vocabulary * len(ids))
        logits = torch.from_numpy(np.frombuffer(raw, np.float32).reshape(len(ids), -1).copy())
        self.lib.llama_batch_free(batch)
        return logits

    def greedy(self, prompt, position, count, end):
        output = []
        logits = self.decode(prompt, position)
        while len(output) < count and (token := int(logits[-1].argmax())) != end:
            output.append(token)
            logits = self.decode([token], position + len(prompt) + len(output) - 1)
        return output

    def save(self, path, tokens, sequence=0):
        array = self.ffi.new("llama_token[]", tokens)
        assert self.lib.llama_state_seq_save_file(self.context, str(path).encode(), sequence, array, len(tokens))
        return path.read_bytes()

    def load(self, path, sequence=0):
        """The tokens of a file that was taken; None: it was refused."""
        tokens, count = self.ffi.new("llama_token[]", MAX_POSITIONS), self.ffi.new("size_t *")
        name = str(path).encode()
        read = self.lib.llama_state_seq_load_file(self.context, name, sequence, tokens, MAX_POSITIONS, count)
        return list(tokens[0 : count[0]]) if read else None


@pytest.fixture(scope="module")
def make(folder, tiny_backbone):
    """A factory: `make(model_type)` gives a backbone and its GGUF file."""
    made = {}

    def one(name, **changes):
        key = f"{name}{changes}"
        if key not in made:
            backbone = tiny_backbone(name, **{**CHANGES.get(name, {}), **changes})
            made[key] = backbone, write_gguf(folder / f"{len(made)}.gguf", backbone.model, backbone.tokenizer)
        return made[key]

    return one


@pytest.fixture
def run():
    """A factory of runtimes that are closed afterwards."""
    made = []

    def one(*args, **options):
        made.append(Runtime(*args, **options))
        return made[-1]

    yield one
    for runtime in made:
        runtime.close()


def compute_prefix(backbone, ids):
    """The keys and values of a text."""
    cache = backbone.model(torch.tensor([ids]), use_cache=True).past_key_values
    layers = tuple((layer.keys[0], layer.values[0]) for layer in cache.layers)
    return Prefix({"decoder": layers}, make_header(backbone))


def version_of(runtime, folder):
    """The layout that this build writes."""
    runtime.clear()
    runtime.decode([1], 0)
    (version,) = struct.unpack_from("<I", runtime.save(folder / "version.bin", [1]), 4)
    runtime.clear()
    return int(version)


def restore(runtime, prefix, backbone, folder):
    """Load a prefix from a file in the layout of this build; without flash attention, values are kept transposed."""
    file, tokens = folder / "prefix.bin", placeholders_for(prefix, backbone)
    layout = {"version": version_of(runtime, folder), "kv_type": "f32", "transposed": True}
    file.write_bytes(encode_file(rows_of(prefix, backbone), tokens, **layout))
    assert runtime.load(file) == tokens


@pytest.mark.deploys("llama.cpp", "tokens, and logits to 1e-4 (GPT-2: to its own GELU)", by="name")
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_logits_and_tokens_are_the_backbones(name, make, run, random_prefix, random_ids, tmp_path):
    backbone, path = make(name)
    runtime = run(path)
    prefix = random_prefix(backbone, 7, seed=1)
    prompts = [random_ids(n, seed) for seed, n in enumerate((9, 1, 5, 14))]
    expected = generate_ids(backbone, prompts, [prefix] * 4, config=GenerateConfig(max_new_tokens=12))
    assert expected != generate_ids(backbone, prompts, [None] * 4, config=GenerateConfig(max_new_tokens=12))
    for prompt, output in zip(prompts, expected, strict=True):
        restore(runtime, prefix, backbone, tmp_path)
        logits = runtime.decode(prompt, 7)
        wanted = backbone.forward(torch.tensor([prompt]), prefixes=prefix).logits[0]
        torch.testing.assert_close(logits, wanted, rtol=0, atol=GELU if name == "gpt2" else 1e-4)
        restore(runtime, prefix, backbone, tmp_path)
        assert runtime.greedy(prompt, 7, 12, backbone.eos_id) == output


@pytest.mark.deploys(
    "llama.cpp", "two joined prefixes: tokens, and the logits of its own cache of both texts to 1e-4", by="name"
)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
@torch.no_grad()
def test_a_joined_prefix_is_two_texts_that_do_not_see_each_other(name, make, run, random_ids, tmp_path):
    """llama.cpp computes the second text's keys at the positions that joining turns them to."""
    backbone, path = make(name)
    runtime = run(path, sequences=2, unified=True)
    texts, prompt = (random_ids(6, 1), random_ids(4, 2)), random_ids(9, 3)
    parts = [compute_prefix(backbone, ids) for ids in texts]
    stored = save_prefix(tmp_path / "joined.safetensors", concatenate(parts, backbone.rotation))
    joined = load_prefix(stored, backbone)
    runtime.decode(texts[0], 0)
    runtime.decode(texts[1], 6, sequence=1)
    runtime.copy(1, 0)
    wanted = runtime.decode(prompt, 10)
    restore(runtime, joined, backbone, tmp_path)
    torch.testing.assert_close(runtime.decode(prompt, 10), wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        backbone.forward(torch.tensor([prompt]), prefixes=joined).logits[0], wanted, rtol=0, atol=1e-4
    )
    restore(runtime, joined, backbone, tmp_path)
    (expected,) = generate_ids(backbone, [prompt], [joined], config=GenerateConfig(max_new_tokens=12))
    assert runtime.greedy(prompt, 10, 12, backbone.eos_id) == expected


@pytest.mark.deploys("llama.cpp", "a prefix cut at its start: the logits of its own shifted cache to 1e-4", by="name")
@pytest.mark.parametrize("name", ["llama", "qwen3"])
@torch.no_grad()
def test_a_cut_prefix_is_a_shifted_cache(name, make, run, random_ids, tmp_path):
    """llama.cpp removes the first positions of a text, and moves the others there."""
    backbone, path = make(name)
    runtime = run(path)
    text, prompt = random_ids(9, 1), random_ids(7, 3)
    stored = save_prefix(tmp_path / "cut.safetensors", cut(compute_prefix(backbone, text), 5, end="start"))
    kept = load_prefix(stored, backbone)
    runtime.decode(text, 0)
    runtime.drop(4)
    wanted = runtime.decode(prompt, 5)
    restore(runtime, kept, backbone, tmp_path)
    torch.testing.assert_close(runtime.decode(prompt, 5), wanted, rtol=0, atol=1e-4)
    logits = backbone.forward(torch.tensor([prompt]), prefixes=kept).logits[0]
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)


@torch.no_grad()
def test_half_precision_and_flash_attention(make, run, random_prefix, random_ids, tmp_path):
    backbone, path = make("llama")
    prefix, prompt = random_prefix(backbone, 7, seed=1), random_ids(9)
    rows, tokens = rows_of(prefix, backbone), placeholders_for(prefix, backbone)
    wanted = backbone.forward(torch.tensor([prompt]), prefixes=prefix).logits[0]
    for flash in (True, False):
        runtime = run(path, kv_type=KV_TYPES["f16"][0], flash=flash)
        version = version_of(runtime, tmp_path)
        file = tmp_path / f"{flash}.bin"
        file.write_bytes(encode_file(rows, tokens, version=version, transposed=not flash))
        assert runtime.load(file) == tokens
        logits = runtime.decode(prompt, 7)
        torch.testing.assert_close(logits, wanted, rtol=0, atol=0.02)
        # A file of the other layout of values is refused, not misread.
        file.write_bytes(encode_file(rows, tokens, version=version, transposed=flash))
        runtime.clear()
        assert runtime.load(file) is None


# --- the server -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def serve(folder):
    """A factory: `serve(gguf, slots)` starts llama.cpp's own server in this process, and gives its address."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp is installed on Linux (x86_64) only")
    made = []

    def start(path, slots, parallel):
        slots.mkdir()
        params = xllamacpp.CommonParams()
        params.model.path, params.slot_save_path = str(path), f"{slots}/"
        params.n_ctx, params.n_parallel, params.port = MAX_POSITIONS * parallel, parallel, 0
        params.cpuparams.n_threads, params.warmup, params.verbosity = 1, False, 0
        made.append(xllamacpp.Server(params))
        return str(made[-1].listening_address)

    return start


def post(url, path, body):
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


def ask(url, facts, text, count):
    prompt = [*facts["placeholders"], facts["text_format"]["prompt"].replace("{source}", text)]
    body = {"prompt": prompt, "id_slot": 0, "cache_prompt": True, "temperature": 0, "n_predict": count}
    return post(url, "/completion", body)


TEXTS = ["name : Aromi | food : soup", "a", "<s> and </s>"]


@pytest.mark.deploys("llama.cpp", "texts of `llama-server`, by the restored slot", model="llama")
def test_the_server_writes_what_generate_writes(make, serve, random_prefix, tmp_path):
    backbone, path = make("llama")
    prefix, slots, exported = random_prefix(backbone, 6, seed=3), tmp_path / "slots", tmp_path / "exported"
    url = serve(path, slots, 1)
    facts = export_llama_cpp(prefix, backbone, exported)
    shutil.copy(exported / "prefix.bin", slots)
    assert json.loads((exported / "ask.json").read_text())["prompt"][:-1] == facts["placeholders"]
    # Without the state in the slot, the placeholders are read as ordinary tokens, and only `cache_n` tells.
    assert ask(url, facts, TEXTS[0], 1)["timings"]["cache_n"] == 0
    assert post(url, "/slots/0?action=restore", {"filename": facts["file"]})["n_restored"] >= 6
    expected = generate(backbone, TEXTS, prefix, max_new_tokens=10)
    for text, output in zip(TEXTS, expected, strict=True):
        reply = ask(url, facts, text, 10)
        assert reply["timings"]["cache_n"] >= 6
        assert reply["tokens_evaluated"] == 6 + len(backbone.encode(f" {text} <s>"))
        assert reply["content"].strip() == output


# --- the engine -------------------------------------------------------------------------------------------------------


def test_a_slot_survives_texts_that_are_cancelled_while_it_is_busy(random_prefix, tmp_path):
    backbone = load_backbone(store_model(tmp_path, "llama", max_position_embeddings=8192, num_hidden_layers=1))
    gguf = write_gguf(tmp_path / "tiny.gguf", backbone.model, backbone.tokenizer)
    one, other = (random_prefix(backbone, 40, seed=seed).detach() for seed in (0, 1))
    ended, options = threading.Event(), SamplingParams(max_new_tokens=4, banned=(backbone.eos_id,))
    with LlamaCppEngine(backbone, str(gguf), num_slots=1, max_length=8192, threads=1) as engine:
        for length, prefix, seconds in ((8000, one, 0.3), (5, other, 0.02), (5, one, 0.0)):
            request = Request((7,) * length, prefix, options)
            engine.submit(request, lambda output: ended.set() if output.finish_reason == "length" else None)
            time.sleep(seconds)
            if seconds:
                engine.cancel(request.id)
        assert ended.wait(30)
