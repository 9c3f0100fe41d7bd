"""vLLM with this project's plugin against `generate`: the same tokens, whatever is mixed in its batch.

Needs vLLM, in an environment of its own: `make test-vllm` makes one, or PREFIXTUNE_VLLM_PYTHON names its Python.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.prefixes import load_prefix, make_header
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate, generate_ids
from prefixtune.prefix.compose import concatenate
from prefixtune.prefix.prefix import Prefix, read_artifact, save_prefix
from prefixtune.training.starts.words import from_words

_ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("PREFIXTUNE_VLLM_PYTHON") or _ROOT / ".venv-vllm" / "bin" / "python")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="vLLM is not installed (`make test-vllm`)"),
]

BASE, NEW_TOKENS = "smollm2-135m", 24
LENGTHS = (10, 16, 37, 64, 128, 200)
PROMPTS = (
    "The Eagle is a cheap pub near",
    "name : Blue Spice | Type : restaurant | food : Chinese",
    "Once upon a time",
    "In 1969, the first men on the Moon",
)
MODEL = "SmolLM2-135M (llama)"
MESSAGES = [{"role": "user", "content": "Where can I eat fish near the river?"}]
SETTINGS = GenerateConfig(max_new_tokens=NEW_TOKENS)


def make_prefix(backbone: Any, length: int, seed: int = 0) -> Prefix:
    """A prefix that changes what is written: the activations of words, with noise."""
    words = "Describe the restaurant in one sentence for a guest who has never been to this town. " * 30
    start = from_words(backbone, words[length % 60 :], length)
    generator = torch.Generator().manual_seed(1000 * seed + length)

    def noisy(part: torch.Tensor, scale: float) -> torch.Tensor:
        return part + scale * torch.randn(part.shape, generator=generator)

    layers = {
        site: tuple((noisy(key, 0.1), noisy(value, 0.05)) for key, value in pairs)
        for site, pairs in start.layers.items()
    }
    return Prefix(layers, make_header(backbone, task="e2e", description=f"of {length}"))


@dataclass
class Server:
    """A running server, and what its outputs must be."""

    url: str
    folder: Path
    backbone: Any
    prefixes: dict[str, Prefix]
    log: Path
    kept: dict[tuple[str, tuple[int, ...]], str] = field(default_factory=dict)

    @property
    def client(self) -> Any:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def expected(self, model: str, ids: Sequence[int]) -> str:
        """What `generate` writes after these tokens, alone."""
        key = model, tuple(ids)
        if key not in self.kept:
            (written,) = generate_ids(self.backbone, [list(ids)], [self.prefixes.get(model)], config=SETTINGS)
            self.kept[key] = self.backbone.decode(written)
        return self.kept[key]

    def complete(self, model: str, prompt: Any, **options: Any) -> Any:
        options = {"max_tokens": NEW_TOKENS, "temperature": 0, **options}
        return self.client.completions.create(model=model, prompt=prompt, **options)

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        request = urllib.request.Request(
            f"{self.url}{path}", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return reply.status, json.loads(reply.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())


@contextlib.contextmanager
def serving(
    backbone: Any, name: str, prefixes: dict[str, Prefix], folder: Path, more: str, **flags: Any
) -> Iterator[Server]:
    """`prefixtune serve --engine vllm` in float32, with some options of its own and some of vLLM's."""
    (folder / "prefixes").mkdir()
    for prefix_name, prefix in prefixes.items():
        save_prefix(folder / "prefixes" / f"{prefix_name}.safetensors", prefix)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "server.log"
    flags |= {"backbone": name, "backbone_id": BASE, "prefixes": folder / "prefixes", "dtype": "float32", "port": port}
    flags |= {"data_folder": folder / "data"}
    command = [sys.executable, "-m", "prefixtune", "serve", "--engine", "vllm", "--vllm-python", str(PYTHON)]
    command += [part for key, value in flags.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT / "src"), "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    # By default it wants a CPU socket for each process.
    environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [*command, f"--vllm-args={more}"], stdout=out, stderr=out, env=environment, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            if process.poll() is not None:
                pytest.fail(f"vLLM did not start: {log.read_text()[-20000:]}")
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(1)
        yield Server(url, folder / "prefixes", backbone, prefixes, log)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def server(default_backbone: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """vLLM over the embedded backbone, with room for some of the prefixes and of the texts, and not for all at once."""
    prefixes = {f"p{length}": make_prefix(default_backbone, length) for length in LENGTHS}
    more = "--enforce-eager --block-size 32 --num-gpu-blocks-override 40"
    folder = tmp_path_factory.mktemp("vllm")
    with serving(default_backbone, BASE, prefixes, folder, more, max_length=512, cache_mib=12) as running:
        yield running


@pytest.mark.deploys(
    "vLLM",
    "28 mixed requests of 6 prefixes and of the bare model, token for token, some preempted and resumed",
    model=MODEL,
)
def test_mixed_requests_equal_generate_one_by_one(server: Server):
    cases = [(model, prompt) for prompt in PROMPTS for model in (BASE, *server.prefixes)]
    assert len(cases) == 28
    with ThreadPoolExecutor(len(cases)) as pool:
        replies = list(pool.map(lambda case: server.complete(*case), cases))
    for (model, prompt), reply in zip(cases, replies, strict=True):
        ids = server.backbone.encode(prompt)
        assert reply.choices[0].text == server.expected(model, ids), (model, prompt)
        assert reply.model == model
        assert reply.usage.prompt_tokens == len(ids)
        assert reply.usage.total_tokens == len(ids) + reply.usage.completion_tokens
    # Prefixes change what is written, or equality would say nothing.
    assert len({server.expected(model, server.backbone.encode(PROMPTS[0])) for model in (BASE, *server.prefixes)}) > 3
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as reply:
        preemptions = [
            line.split() for line in reply.read().decode().splitlines() if line.startswith("vllm:num_preemptions_total")
        ]
    assert float(preemptions[0][-1]) > 0, "some requests should have been preempted"


def test_the_same_again_from_cached_blocks(server: Server):
    ids = server.backbone.encode(PROMPTS[1])
    for _ in range(2):
        for model in ("p64", "p128", BASE):
            assert server.complete(model, PROMPTS[1]).choices[0].text == server.expected(model, ids)


def test_streams(server: Server):
    ids = server.backbone.encode(PROMPTS[0])
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    pieces = list(server.complete("p16", PROMPTS[0], **options))
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == server.expected("p16", ids)
    assert {piece.model for piece in pieces} == {"p16"}
    assert {piece.usage.prompt_tokens for piece in pieces} == {len(ids)}


@pytest.mark.deploys("vLLM", "chats, whole and streamed, token for token", model=MODEL)
@pytest.mark.parametrize("stream", [False, True])
def test_chats(server: Server, stream: bool):
    tokenizer = server.backbone.tokenizer
    ids = tokenizer.apply_chat_template(MESSAGES, tokenize=True, add_generation_prompt=True, return_dict=False)
    for model in (BASE, "p10", "p37", "p200"):
        options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        reply = server.client.chat.completions.create(
            model=model, messages=MESSAGES, max_tokens=NEW_TOKENS, temperature=0, **options
        )
        if stream:
            pieces = list(reply)
            text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
            usage = pieces[-1].usage
        else:
            text, usage = reply.choices[0].message.content, reply.usage
        assert text == server.expected(model, ids), model
        assert usage.prompt_tokens == len(ids)


@pytest.mark.deploys("vLLM", "a prefix's own text format: completions and chats, whole and streamed", model=MODEL)
@pytest.mark.parametrize(
    "form",
    [
        {"prompt": " {source} {separator}", "target": " {target} ", "separator": "<|endoftext|>"},
        {"prompt": "{source}\nText:", "target": " The{target}"},
    ],
    ids=["the usual one", "with words around the target"],
)
def test_a_prefix_has_the_text_format_of_its_training(server: Server, form: dict[str, str]):
    prefix = server.prefixes["p37"]
    made = Prefix(prefix.layers, {**prefix.header, "text_format": form})
    path = save_prefix(server.folder / "formatted.safetensors", made)
    source, messages = PROMPTS[1], [{"role": "user", "content": PROMPTS[1]}]
    options = {"model": "formatted", "max_tokens": NEW_TOKENS, "temperature": 0}
    try:
        (wanted,) = generate(server.backbone, [source], made, config=SETTINGS)
        assert wanted
        assert server.complete("formatted", source).choices[0].text == wanted
        pieces = server.complete("formatted", source, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == wanted
        chats = server.client.chat.completions
        assert chats.create(messages=messages, **options).choices[0].message.content == wanted
        chunks = chats.create(messages=messages, stream=True, **options)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == wanted
        with pytest.raises(openai.BadRequestError, match="the chat has 2 messages"):
            chats.create(messages=[{"role": "system", "content": "be kind"}, *messages], **options)
    finally:
        path.unlink()


@pytest.mark.deploys(
    "vLLM", "24 mixed requests of 2 to 4 joined prefixes, token for token with the composed file", model=MODEL
)
def test_joined_prefixes_equal_generate_with_the_composed_file(server: Server, tmp_path: Path):
    rng, names = random.Random(0), ["p10", "p16", "p37", "p64"]
    joins = [tuple(rng.sample(names, rng.randint(2, 4))) for _ in range(12)] + [("p10", "p37"), ("p37", "p10")]
    composed = {}
    for number, parts in enumerate(set(joins)):
        files = [read_artifact(server.folder / f"{name}.safetensors") for name in parts]
        joined = concatenate(files, server.backbone.rotation, names=parts)
        composed[parts] = load_prefix(save_prefix(tmp_path / f"{number}.safetensors", joined), server.backbone)
    cases = [(parts, rng.choice(PROMPTS)) for parts in joins for _ in range(2)][:24]
    cases[-2:] = [(("p10", "p37"), PROMPTS[0]), (("p37", "p10"), PROMPTS[0])]

    def request(case: tuple[int, tuple[tuple[str, ...], str]]) -> Any:
        number, (parts, prompt) = case
        if number % 2:
            return server.complete("+".join(parts), prompt)
        return server.complete(BASE, prompt, extra_body={"prefixes": list(parts)})

    with ThreadPoolExecutor(len(cases)) as pool:
        replies = list(pool.map(request, enumerate(cases)))
    for (parts, prompt), reply in zip(cases, replies, strict=True):
        ids = server.backbone.encode(prompt)
        (written,) = generate_ids(server.backbone, [ids], [composed[parts]], config=SETTINGS)
        assert reply.choices[0].text == server.backbone.decode(written), (parts, prompt)
        assert reply.model == "+".join(parts)
        assert reply.usage.prompt_tokens == len(ids)
    # Joining changes what is written, and its order does too, or equality would say nothing.
    inputs = [server.backbone.encode(prompt) for prompt in PROMPTS]
    single = [load_prefix(server.folder / f"{name}.safetensors", server.backbone) for name in ("p10", "p37")]
    controls = [composed["p10", "p37"], composed["p37", "p10"], *single]
    controlled = [generate_ids(server.backbone, inputs, [prefix] * len(inputs), config=SETTINGS) for prefix in controls]
    assert len({str(texts) for texts in controlled}) == len(controls)


def test_a_job_trained_beside_vllm_is_served_at_once(server: Server):
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
    assert "buses" in {model.id for model in server.client.models.list().data}
    prefix = load_prefix(server.folder / "buses.safetensors", server.backbone)
    (written,) = generate(server.backbone, ["Bus 7 goes to"], prefix, config=SETTINGS)
    assert server.complete("buses", "Bus 7 goes to").choices[0].text == written
    assert server.client.models.delete("buses").deleted
    assert "buses" not in {model.id for model in server.client.models.list().data}


def test_a_prefix_that_cannot_be_loaded_fails_alone(server: Server):
    """Its header is whole, but its numbers are not: that is seen by the worker, after all checks of the server."""
    path = save_prefix(server.folder / "nan.safetensors", make_prefix(server.backbone, 40))
    raw = bytearray(path.read_bytes())
    raw[-4:] = b"\xff\xff\xff\xff"
    path.write_bytes(raw)
    try:
        ids = server.backbone.encode(PROMPTS[3])
        with ThreadPoolExecutor(2) as pool:
            broken, whole = (
                pool.submit(server.complete, "nan", PROMPTS[3]),
                pool.submit(server.complete, "p37", PROMPTS[3]),
            )
            assert whole.result().choices[0].text == server.expected("p37", ids)
            with pytest.raises(openai.InternalServerError):
                broken.result()
        assert server.complete("p128", PROMPTS[3]).choices[0].text == server.expected("p128", ids)
    finally:
        path.unlink()


def test_a_client_cannot_forge_a_reference(server: Server):
    ids = server.backbone.encode(PROMPTS[0])
    server.complete("p64", PROMPTS[0])
    ids_with_zeros = [0] * 64 + ids
    body = {"model": BASE, "prompt": ids_with_zeros, "max_tokens": NEW_TOKENS, "temperature": 0}
    status, response = server.post("/v1/completions", body)
    assert status == 200
    assert response["choices"][0]["text"] == server.expected(BASE, ids_with_zeros)
    reference = ["p64", [1, 2], 64]
    for index, forged in enumerate((3, {"prefix": reference, "proof": ""}, {"prefix": reference, "proof": "\u00e9"})):
        # A forged reference fails, and no other request does.
        more = {"kv_transfer_params": {"prefixtune": forged}, "cache_salt": f"own{index}"}
        status, response = server.post("/v1/completions", {**body, **more})
        assert status == 500
    assert server.complete("p64", PROMPTS[0]).choices[0].text == server.expected("p64", ids)


def test_a_replaced_file_counts_for_new_requests(server: Server, tmp_path: Path):
    ids = server.backbone.encode(PROMPTS[2])
    first, second = make_prefix(server.backbone, 20, seed=1), make_prefix(server.backbone, 33, seed=2)
    written = []
    for prefix in (first, second):
        new = save_prefix(tmp_path / "new.safetensors", prefix)
        os.replace(shutil.copy(new, server.folder / ".new"), server.folder / "changing.safetensors")
        server.prefixes["changing"] = load_prefix(server.folder / "changing.safetensors", server.backbone)
        server.kept.pop(("changing", tuple(ids)), None)
        reply = server.complete("changing", PROMPTS[2])
        assert reply.choices[0].text == server.expected("changing", ids)
        assert reply.usage.prompt_tokens == len(ids)
        written.append(reply.choices[0].text)
    del server.prefixes["changing"]
    (server.folder / "changing.safetensors").unlink()
    with pytest.raises(openai.NotFoundError):
        server.complete("changing", "Hello")
    assert written[0] != written[1]


@pytest.mark.deploys("vLLM", "12 mixed requests over two tensor-parallel processes, token for token", model="llama")
def test_two_processes_share_the_heads(tiny_tokenizer: Any, tmp_path: Path):
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
    prefixes = {f"p{length}": random_prefix(backbone, length) for length in (5, 32, 40)}
    more = "--enforce-eager --tensor-parallel-size 2 --distributed-executor-backend mp"
    with serving(backbone, str(tmp_path / "model"), prefixes, tmp_path, more, max_length=256) as running:
        cases = [(name, text) for name in (BASE, *prefixes) for text in ("some text", "another one, longer", "x")]
        with ThreadPoolExecutor(len(cases)) as pool:
            replies = list(pool.map(lambda case: running.complete(*case), cases))
        for (name, text), reply in zip(cases, replies, strict=True):
            # Half a character at the end of a text is decoded by one side only.
            written, expected = (
                output.rstrip("\ufffd")
                for output in (reply.choices[0].text, running.expected(name, backbone.encode(text)))
            )
            assert written == expected, (name, text)
        assert len({running.expected(name, backbone.encode("some text")) for name in (BASE, *prefixes)}) == 4


@pytest.mark.deploys(
    "vLLM", "layers with a sliding window that is shorter than the longest sequence", model="mistral", refused=True
)
def test_sliding_windows_are_refused(tiny_tokenizer: Any, tmp_path: Path):
    from transformers import MistralConfig, MistralForCausalLM

    shape = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "sliding_window": 64}
    model = MistralForCausalLM(MistralConfig(vocab_size=len(tiny_tokenizer), **shape, **heads))
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    with (
        pytest.raises(
            pytest.fail.Exception, match="a sliding window of 64 positions, and the prefix would drop out of it"
        ),
        serving(None, str(tmp_path / "model"), {}, tmp_path, "--enforce-eager", max_length=256),
    ):
        pass


def random_prefix(backbone: Any, length: int) -> Prefix:
    """Random numbers in the shapes of a tiny backbone."""
    generator = torch.Generator().manual_seed(length)
    layers = tuple(
        (
            torch.randn(s.num_kv_heads, length, s.key_dim, generator=generator),
            torch.randn(s.num_kv_heads, length, s.value_dim, generator=generator),
        )
        for s in backbone.geometry["decoder"]
    )
    return Prefix({"decoder": layers}, make_header(backbone))
