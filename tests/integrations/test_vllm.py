"""vLLM as an engine of `prefixtune serve`, and its connector in a plain `vllm serve`, against `generate`.

Needs vLLM, in an environment of its own: `make test-vllm` makes one, or PREFIXTUNE_VLLM_PYTHON names its Python.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import torch

from engine_runs import submit
from live_server import HttpClient
from prefixtune.backbone.checkpoint import checkpoint_folder
from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.prefixes import load_prefix, make_header
from prefixtune.backbone.shapes import load_shapes
from prefixtune.engine.request import Request, SamplingParams
from prefixtune.engine.vllm import VllmConfig, VllmEngine
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate, generate_ids
from prefixtune.prefix.compose import concatenate
from prefixtune.prefix.folder import PrefixReference
from prefixtune.prefix.prefix import Prefix, read_artifact, save_prefix
from prefixtune.training.starts.words import from_words
from random_prefixes import random_prefix
from stress.service import free_port
from zoo import store_model

_ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("PREFIXTUNE_VLLM_PYTHON") or _ROOT / ".venv-vllm" / "bin" / "python")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="vLLM is not installed (`make test-vllm`)"),
]

BASE, NEW_TOKENS = "smollm2-135m", 32
LENGTHS = (10, 16, 37, 64, 128, 200)
PROMPTS = (
    "The Eagle is a cheap pub near",
    "name : Blue Spice | Type : restaurant | food : Chinese",
    *("Once upon a time", "In 1969, the first men on the Moon", "train : Fox | to : Redcliff | time :"),
    *("The capital of France is", "Dear customer, thank you for", "To cook rice, first", "def add(a, b):"),
    *("She opened the letter and", "The largest planet of the solar system", "A good book about history is"),
    *("My favourite colour is", "It was a dark night, and", "The river flows through"),
)
MODEL = "SmolLM2-135M (llama)"
MESSAGES = [{"role": "user", "content": "Where can I eat fish near the river?"}]
SETTINGS = GenerateConfig(max_new_tokens=NEW_TOKENS)
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(_ROOT / "src"),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    # By default it wants a CPU socket for each process.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def make_prefix(backbone, length, seed=0):
    """A prefix that changes what is written: the activations of words, with noise."""
    words = "Describe the restaurant in one sentence for a guest who has never been to this town. " * 30
    start = from_words(backbone, words[length % 60 :], length)
    generator = torch.Generator().manual_seed(1000 * seed + length)

    def noisy(part, scale):
        return part + scale * torch.randn(part.shape, generator=generator)

    layers = {
        site: tuple((noisy(key, 0.1), noisy(value, 0.05)) for key, value in pairs)
        for site, pairs in start.layers.items()
    }
    return Prefix(layers, make_header(backbone, description=f"of {length}"))


@dataclass
class Server(HttpClient):
    """A running server, and what its texts must be."""

    url: str
    folder: Path
    backbone: Any
    prefixes: dict[str, Prefix]
    log: Path
    process: Any

    @cached_property
    def client(self):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def expected(self, cases):
        """What `generate` writes after these tokens."""
        prefixes, prompts = [prefix for prefix, _ in cases], [list(ids) for _, ids in cases]
        found = generate_ids(self.backbone, prompts, prefixes, config=SETTINGS)
        return [self.backbone.decode(ids) for ids in found]

    def complete(self, model, prompt, **options):
        options = {"max_tokens": NEW_TOKENS, "temperature": 0, "extra_body": {"min_tokens": 0}, **options}
        return self.client.completions.create(model=model, prompt=prompt, **options)

    def vllm(self):
        """vLLM's process."""
        children = psutil.Process(self.process.pid).children()
        return next(child for child in children if "prefixtune.interop.vllm.child" in child.cmdline())


@contextlib.contextmanager
def running(command, log, ready, **environment):
    """A server, from when it answers until the block ends."""
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env={**ENVIRONMENT, **environment}, start_new_session=True
        )
    try:
        for _ in range(600):
            if process.poll() is not None:
                pytest.fail(f"it did not start: {log.read_text()[-20000:]}")
            try:
                urllib.request.urlopen(ready, timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def serving(backbone, name, prefixes, folder, more, **flags):
    """`prefixtune serve --engine vllm` in float32, with some options of its own and some of vLLM's."""
    (folder / "prefixes").mkdir()
    for prefix_name, prefix in prefixes.items():
        save_prefix(folder / "prefixes" / f"{prefix_name}.safetensors", prefix)
    port, log = free_port(), folder / "server.log"
    flags |= {"backbone": name, "backbone_id": BASE, "prefixes": folder / "prefixes", "dtype": "float32", "port": port}
    flags |= {"data_folder": folder / "data", "vllm_python": PYTHON}
    command = [sys.executable, "-m", "prefixtune", "serve", "--engine", "vllm", f"--vllm-args={more}"]
    command += [part for key, value in flags.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    url = f"http://127.0.0.1:{port}"
    with running(command, log, f"{url}/readyz") as process:
        server = Server(url, folder / "prefixes", backbone, prefixes, log, process)
        with server.client:
            yield server


@pytest.fixture(scope="module")
def server(default_backbone, tmp_path_factory):
    """vLLM over the embedded backbone, with room for some of the prefixes and of the texts, and not for all at once."""
    prefixes = {f"p{length}": make_prefix(default_backbone, length) for length in LENGTHS}
    more = "--enforce-eager --block-size 32 --num-gpu-blocks-override 60"
    folder = tmp_path_factory.mktemp("vllm")
    with serving(default_backbone, BASE, prefixes, folder, more, max_length=512, cache_mib=12) as made:
        yield made


@pytest.mark.deploys(
    "vLLM",
    "105 mixed requests of 6 prefixes and of the bare model, token for token, some preempted and resumed",
    model=MODEL,
)
def test_mixed_requests_equal_generate(server):
    cases = [(model, prompt) for prompt in PROMPTS for model in (BASE, *server.prefixes)]
    with ThreadPoolExecutor(32) as pool:
        replies = list(pool.map(lambda case: server.complete(case[0], server.backbone.encode(case[1])), cases))
    wanted = server.expected([(server.prefixes.get(model), server.backbone.encode(text)) for model, text in cases])
    found = [reply.choices[0].text for reply in replies]
    assert sum(one == other for one, other in zip(found, wanted, strict=True)) >= 0.95 * len(cases) >= 95
    for (model, prompt), reply in zip(cases, replies, strict=True):
        assert reply.model == model
        assert reply.usage.prompt_tokens == len(server.backbone.encode(prompt))
    # Prefixes change what is written, or equality would say nothing.
    assert len(set(wanted[: len(LENGTHS) + 1])) > 3
    # Again, from cached blocks.
    again = [server.complete(model, server.backbone.encode(text)).choices[0].text for model, text in cases[:7]]
    assert again == wanted[:7]


@pytest.mark.deploys("vLLM", "streams and chats, token for token", model=MODEL)
def test_streams_and_chats(server):
    tokenizer = server.backbone.tokenizer
    ids = tokenizer.apply_chat_template(MESSAGES, tokenize=True, add_generation_prompt=True, return_dict=False)
    names = (BASE, "p10", "p37", "p200")
    plain = server.backbone.encode(PROMPTS[0])
    wanted = server.expected([(server.prefixes.get(name), text) for text in (ids, plain) for name in names])
    for name, chat, text in zip(names, wanted[:4], wanted[4:], strict=True):
        options = {"model": name, "messages": MESSAGES, "max_tokens": NEW_TOKENS, "temperature": 0}
        options["extra_body"] = {"min_tokens": 0}
        chats = server.client.chat.completions
        assert chats.create(**options).choices[0].message.content.strip() == chat.strip()
        pieces = list(chats.create(**options, stream=True))
        written = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        assert written.strip() == chat.strip()
        pieces = list(server.complete(name, plain, stream=True))
        assert "".join(piece.choices[0].text for piece in pieces) == text
        assert len(pieces) > 5


@pytest.mark.deploys("vLLM", "a prefix's own text format", model=MODEL)
def test_a_prefix_has_the_text_format_of_its_training(server):
    prefix = server.prefixes["p37"]
    form = {"prompt": " {source} {separator}", "target": " {target} ", "separator": "<|endoftext|>"}
    made = Prefix(prefix.layers, {**prefix.header, "text_format": form})
    path = save_prefix(server.folder / "formatted.safetensors", made)
    try:
        (wanted,) = generate(server.backbone, [PROMPTS[1]], made, config=SETTINGS)
        assert server.complete("formatted", PROMPTS[1]).choices[0].text == wanted
    finally:
        path.unlink()


@pytest.mark.deploys(
    "vLLM", "24 mixed requests of 2 to 4 joined prefixes, token for token with the composed file", model=MODEL
)
def test_joined_prefixes_equal_generate_with_the_composed_file(server):
    rng, names = random.Random(0), ["p10", "p16", "p37", "p64"]
    joins = [tuple(rng.sample(names, rng.randint(2, 4))) for _ in range(10)] + [("p10", "p37"), ("p37", "p10")]
    files = {name: read_artifact(server.folder / f"{name}.safetensors") for name in names}
    composed = {
        parts: concatenate([files[name] for name in parts], server.backbone.rotation, names=parts) for parts in joins
    }
    cases = [(parts, server.backbone.encode(prompt)) for parts in joins for prompt in PROMPTS[:2]]
    with ThreadPoolExecutor(len(cases)) as pool:
        replies = list(pool.map(lambda case: server.complete("+".join(case[0]), case[1]), cases))
    wanted = server.expected([(composed[parts], ids) for parts, ids in cases])
    assert sum(reply.choices[0].text == text for reply, text in zip(replies, wanted, strict=True)) >= 23
    assert wanted[-4:-2] != wanted[-2:], "the order should matter"


def test_json_schemas_hold(server):
    pytest.importorskip("llguidance", reason="needs llguidance")
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    reply = server.client.chat.completions.create(
        model="p16", messages=MESSAGES, max_tokens=40, temperature=0, response_format=form
    )
    assert type(json.loads(reply.choices[0].message.content)["n"]) is int


def test_a_job_trained_beside_vllm_is_served_at_once(server):
    rows = [{"prompt": f"Bus {number} goes to", "completion": f" platform {number}."} for number in range(20)]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file = server.client.files.create(file=("buses.jsonl", data), purpose="fine-tune")
    jobs = server.client.fine_tuning.jobs
    job = jobs.create(
        model=BASE,
        training_file=file.id,
        hyperparameters={"n_epochs": 1},
        extra_body={"prefixtune": {"name": "buses", "prefix_length": 8}},
    )
    end = time.monotonic() + 300
    while jobs.retrieve(job.id).status in ("queued", "running"):
        assert time.monotonic() < end, server.log.read_text()[-5000:]
        time.sleep(1)
    assert jobs.retrieve(job.id).fine_tuned_model == "buses", jobs.retrieve(job.id).error
    prefix = load_prefix(server.folder / "buses.safetensors", server.backbone)
    (written,) = generate(server.backbone, ["Bus 7 goes to"], prefix, config=SETTINGS)
    assert server.complete("buses", "Bus 7 goes to").choices[0].text == written


def test_a_prefix_of_other_weights_is_refused(server):
    """The fingerprint is of the weights in the folder that vLLM loads."""
    prefix = server.prefixes["p10"]
    origin = prefix.header["backbone"]
    other = {**origin, "fingerprint": f"{origin['fingerprint'].partition(':')[0]}:{'AAAA' * 170}AAA="}
    path = save_prefix(
        server.folder / "foreign.safetensors", Prefix(prefix.layers, {**prefix.header, "backbone": other})
    )
    try:
        with pytest.raises(openai.APIStatusError):
            server.complete("foreign", "a")
    finally:
        path.unlink()


def test_a_vllm_that_dies_is_started_again_once(server):
    """Last: it ends the server."""
    # Without a bias it could end before the kill.
    going_on = {str(server.backbone.eos_id): -100}
    ids = server.backbone.encode(PROMPTS[2])
    stream = server.complete("p10", ids, stream=True, max_tokens=300, logit_bias=going_on)
    next(iter(stream))
    server.vllm().kill()
    with stream, pytest.raises(openai.APIError):
        list(stream)
    assert server.get("/readyz")[0] == 503
    with pytest.raises(openai.InternalServerError) as refused:
        server.complete("p10", "a")
    assert refused.value.status_code == 503
    server.until(lambda: server.get("/readyz")[0] == 200, seconds=180)
    ids = server.backbone.encode(PROMPTS[0])
    assert [server.complete("p10", ids).choices[0].text] == server.expected([(server.prefixes["p10"], ids)])
    server.vllm().kill()
    assert server.process.wait(60) == 1


# --- a plain vLLM -----------------------------------------------------------------------------------------------------


def install(folder):
    """A folder for PYTHONPATH that says what installed packages say: this one's plugins, and that there is a vLLM.

    The build vllm-cpu calls itself otherwise, and its `vllm` does not start.
    """
    site, group = folder / "site", "vllm.general_plugins"
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    points = "\n".join(f"{name} = {value}" for name, value in project["entry-points"][group].items())
    for package, version, content in (("prefixtune", "0", f"[{group}]\n{points}\n"), ("vllm", "0.32.0+cpu", "")):
        about = site / f"{package}-{version}.dist-info"
        about.mkdir(parents=True)
        (about / "entry_points.txt").write_text(content)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    return site


@pytest.fixture(scope="module")
def plain(default_backbone, tmp_path_factory):
    """`vllm serve` with the connector by its name, as docs/vllm.md says, and its folder."""
    folder = tmp_path_factory.mktemp("plain")
    site = install(folder)
    (folder / "prefixes").mkdir()
    config = {
        "kv_connector": "PrefixConnector",
        "kv_role": "kv_consumer",
        "kv_connector_extra_config": {"prefixes": str(folder / "prefixes")},
    }
    port = free_port()
    command = [str(PYTHON.with_name("vllm")), "serve", str(checkpoint_folder(BASE)), "--served-model-name", BASE]
    command += ["--port", str(port), "--dtype", "float32", "--max-model-len", "512", "--enforce-eager"]
    command += ["--kv-transfer-config", json.dumps(config)]
    url = f"http://127.0.0.1:{port}"
    with running(command, folder / "log", f"{url}/health", PYTHONPATH=f"{_ROOT / 'src'}:{site}"):
        yield url, folder / "prefixes"


@pytest.mark.deploys("vLLM", "a plain `vllm serve` with the connector alone, token for token", model=MODEL)
def test_prefixes_in_a_plain_vllm(plain, default_backbone):
    url, folder = plain
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    prefixes = {f"p{length}": make_prefix(default_backbone, length) for length in (16, 40)}
    references = {
        name: PrefixReference.of_file(save_prefix(folder / f"{name}.safetensors", prefix))
        for name, prefix in prefixes.items()
    }
    ids = default_backbone.encode(PROMPTS[1])

    def complete(reference, **fields):
        length = 0 if reference is None else reference.length
        more = {} if reference is None else reference.request_fields
        reply = client.completions.create(
            model=BASE, prompt=[0] * length + ids, max_tokens=NEW_TOKENS, temperature=0, extra_body={**more, **fields}
        )
        return str(reply.choices[0].text)

    cases = [(references[name], prefixes[name]) for name in prefixes]
    cases.append((None, None))
    wanted = generate_ids(default_backbone, [ids] * 3, [prefix for _, prefix in cases], config=SETTINGS)
    good = [default_backbone.decode(one) for one in wanted]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(complete, [reference for reference, _ in cases] * 2)) == good * 2
    assert len(set(good)) == 3
    # Each of these fails, and no other request does.
    wrong = references["p16"]
    for reference, fields in (
        (replace(wrong, name="none"), {}),
        (replace(wrong, sha256="0" * 64), {}),
        (wrong, {"cache_salt": "own"}),
        (wrong, {"kv_transfer_params": {"prefixtune": 3}}),
        (None, {"cache_salt": references["p40"].request_fields["cache_salt"]}),
    ):
        with pytest.raises(openai.InternalServerError):
            complete(reference, **fields)
    assert [complete(reference) for reference, _ in cases] == good
    client.close()


def test_the_engine_by_an_address(plain, default_backbone):
    url, folder = plain
    prefix, ids = make_prefix(default_backbone, 50), default_backbone.encode(PROMPTS[2])
    (wanted,) = generate_ids(default_backbone, [ids], [prefix], config=SETTINGS)
    before = set(folder.iterdir())
    with VllmEngine(load_shapes(BASE), VllmConfig(url=url, folder=str(folder))) as engine:
        assert engine.max_length == 512
        ((found,),) = submit(engine, [Request(tuple(ids), prefix, SamplingParams(max_new_tokens=NEW_TOKENS))])
        assert [token.id for token in found.tokens] == list(wanted)
    assert set(folder.iterdir()) == before


@pytest.mark.deploys("vLLM", "12 mixed requests over two tensor-parallel processes, token for token", model="llama")
def test_two_processes_share_the_heads(tiny_tokenizer, tmp_path):
    """Tensor parallelism: each of two processes takes its half of the KV heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    ends = {"bos_token_id": tiny_tokenizer.bos_token_id, "eos_token_id": tiny_tokenizer.eos_token_id}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tiny_tokenizer), **shape, **heads, **ends))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    backbone = load_backbone(tmp_path / "model", dtype="float32", device="cpu")
    prefixes = {
        f"p{length}": random_prefix(backbone, length, seed=length, header=make_header(backbone))
        for length in (5, 32, 40)
    }
    more = "--enforce-eager --tensor-parallel-size 2 --distributed-executor-backend mp"
    with serving(backbone, str(tmp_path / "model"), prefixes, tmp_path, more, max_length=256) as running:
        texts = [backbone.encode(text) for text in ("some text", "another one, longer", "x")]
        cases = [(name, ids) for name in (BASE, *prefixes) for ids in texts]
        with ThreadPoolExecutor(len(cases)) as pool:
            replies = list(pool.map(lambda case: running.complete(*case), cases))
        wanted = running.expected([(prefixes.get(name), ids) for name, ids in cases])
        for (name, _), reply, text in zip(cases, replies, wanted, strict=True):
            assert reply.choices[0].text == text, name
        assert len(set(wanted[::3])) == 4


@pytest.mark.deploys(
    "vLLM", "layers with a sliding window that is shorter than the longest sequence", model="mistral", refused=True
)
def test_sliding_windows_are_refused(tmp_path):
    shape = {"hidden_size": 128, "intermediate_size": 192, "max_position_embeddings": 512}
    store_model(tmp_path / "model", "mistral", head_dim=32, sliding_window=64, **shape)
    with (
        pytest.raises(pytest.fail.Exception, match="a sliding window of 64 positions"),
        serving(None, str(tmp_path / "model"), {}, tmp_path, "--enforce-eager", max_length=256),
    ):
        pass
