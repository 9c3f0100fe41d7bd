"""The vLLM plugin's parts that need no vLLM: settings, signed requests, the folder, and the server's middleware."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from command_line import run
from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.prefixes import make_header
from prefixtune.errors import CheckpointError, ConfigError
from prefixtune.interop.vllm.chat_template import PLACEHOLDERS_VARIABLE, PROMPT_VARIABLE, write_template
from prefixtune.interop.vllm.folder import PrefixFolder
from prefixtune.interop.vllm.launch import LaunchConfig
from prefixtune.interop.vllm.middleware import PrefixMiddleware
from prefixtune.interop.vllm.model import geometry_of, heads_of_rank, sample_checkpoint
from prefixtune.interop.vllm.reference import PrefixReference
from prefixtune.interop.vllm.settings import Settings
from prefixtune.prefix.artifact import save_prefix
from prefixtune.prefix.geometry import LayerShape
from prefixtune.prefix.prefix import Prefix

Make = Callable[..., Any]


def transfer(folder: Path, policy: str = "fail", **extra: Any) -> Any:
    """vLLM's VllmConfig, as far as settings are read from it."""
    options = {"prefixes": str(folder), **extra}
    made = SimpleNamespace(kv_connector_extra_config=options, engine_id="drawn", kv_load_failure_policy=policy)
    return SimpleNamespace(kv_transfer_config=made, parallel_config=SimpleNamespace(data_parallel_size=1))


def model_config(**changes: Any) -> Any:
    """vLLM's ModelConfig of a tiny LLaMA."""
    facts = {
        "model": "tiny",
        **dict.fromkeys(("is_encoder_decoder", "use_mla", "is_hybrid", "is_attention_free"), False),
        "is_multimodal_model": False,
        "get_head_size": lambda: 8,
        "get_total_num_kv_heads": lambda: 2,
        "get_total_num_hidden_layers": lambda: 3,
        "hf_text_config": SimpleNamespace(tie_word_embeddings=False),
    }
    return SimpleNamespace(**{**facts, **changes})


# --- settings, and what a request carries -----------------------------------------------------------------------------


def test_settings_come_from_one_place(tmp_path: Path):
    settings = Settings.from_vllm(transfer(tmp_path, cache_mib=2))
    assert (settings.folder, settings.cache_bytes, settings.secret) == (tmp_path, 2**21, b"drawn")
    assert Settings.from_vllm(transfer(tmp_path, secret="own")).secret == b"own"


@pytest.mark.parametrize("several", [{"data_parallel_size": 2}, {"data_parallel_size": 1, "_api_process_count": 2}])
def test_several_processes_share_a_secret(several: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = transfer(tmp_path)
    config.parallel_config = SimpleNamespace(**several)
    with pytest.raises(ConfigError, match="one secret"):
        Settings.from_vllm(config)
    monkeypatch.setenv("PREFIXTUNE_VLLM_SECRET", "shared")
    assert Settings.from_vllm(config).secret == b"shared"


def test_wrong_settings_are_all_told(tmp_path: Path):
    more = {"raw_completions": 1, "on_too_long": "ignore"}
    wrong = transfer(tmp_path / "none", "recompute", cache_mib=0, cach=1, allow_other_backbone="yes", **more)
    with pytest.raises(ConfigError) as caught:
        Settings.from_vllm(wrong)
    for fault in (
        "unknown option 'cach'",
        "existing folder",
        "cache_mib is 0",
        "'yes'",
        "must be 'fail'",
        "raw_completions is 1",
        "'ignore'",
    ):
        assert fault in caught.value.message


def test_a_request_is_known_by_its_proof_alone():
    asked = PrefixReference("pubs", (1, 2), 10)
    sent = json.loads(json.dumps(asked.to_kv_transfer_params(b"secret")))
    assert PrefixReference.from_kv_transfer_params(sent, b"secret") == asked
    for none in (None, {}, 3, {"other": 1}):
        assert PrefixReference.from_kv_transfer_params(none, b"secret") is None
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    facts = sent["prefixtune"]
    for forged in (
        3,
        {},
        {"prefix": None, "proof": ""},
        {"prefix": ["pubs", [1, 2], 10], "proof": "é"},
        {"prefix": ["pubs", [1, 2], 10], "proof": "\ud800"},
        {"prefix": deep, "proof": "x"},
        {**facts, "prefix": ["trains", *facts["prefix"][1:]]},
    ):
        made = PrefixReference.from_kv_transfer_params({"prefixtune": forged}, b"secret")
        assert made is not None
        assert not made.is_proven
    made = PrefixReference.from_kv_transfer_params(sent, b"another")
    assert made is not None
    assert not made.is_proven


def test_no_two_prefixes_versions_or_clients_share_blocks():
    asked = [PrefixReference("a", (1, 2), 10), PrefixReference("b", (1, 2), 10), PrefixReference("a", (1, 3), 10)]
    salts = [each.cache_salt(b"secret", given) for each in asked for given in (None, "mine", "other")]
    assert len(set(salts)) == len(salts)
    assert (
        asked[0].cache_salt(b"secret", None)
        == asked[0].cache_salt(b"secret", None)
        != asked[0].cache_salt(b"another", None)
    )
    # What vLLM takes as a salt.
    assert all(len(salt) <= 128 and salt.isalnum() for salt in salts)


@pytest.mark.parametrize(("heads", "ranks"), [(8, 1), (8, 2), (8, 8), (2, 4), (1, 2), (3, 3)])
def test_ranks_share_out_all_heads(heads: int, ranks: int):
    shares = [list(range(heads))[heads_of_rank(heads, ranks, rank)] for rank in range(ranks)]
    assert sorted({head for share in shares for head in share}) == list(range(heads))
    assert len({len(share) for share in shares}) == 1
    # Query heads are dealt out in order, and each must meet its own KV head.
    queries = [rank * heads // ranks for rank in range(ranks)]
    assert [share[0] for share in shares] == queries


def test_heads_that_cannot_be_shared_out():
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


# --- the folder -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, tiny_models: Make, tiny_tokenizer: Any) -> Path:
    """A tiny LLaMA on disk."""
    folder = tmp_path_factory.mktemp("stored")
    tiny_models("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_weights_on_disk_are_told_as_in_memory(tied: bool, tiny_models: Make, tiny_tokenizer: Any, tmp_path: Path):
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


@pytest.fixture
def folder(stored: Path, random_prefix: Make, tmp_path: Path) -> PrefixFolder:
    """A folder with one prefix, `pubs`, of 5 positions."""
    backbone = load_backbone(stored, dtype="float32", device="cpu")
    put(backbone, random_prefix(backbone, 5), tmp_path / "pubs.safetensors")
    return PrefixFolder(Settings.from_vllm(transfer(tmp_path)), backbone.geometry, "tiny", sample_checkpoint(stored))


def put(backbone: Any, prefix: Prefix, path: Path, **header: Any) -> None:
    save_prefix(path, Prefix(prefix.layers, {**make_header(backbone, task="e2e"), **header}, prefix.head))


def test_a_prefix_is_found_and_followed(folder: PrefixFolder, stored: Path, random_prefix: Make):
    first = folder.find("pubs")
    assert first is not None
    assert (first.reference.name, first.reference.length, first.description) == ("pubs", 5, "e2e")
    assert folder.find("pubs") is first, "an unchanged file is not read again"
    assert folder.find("trains") is None
    assert folder.find("../pubs") is None
    backbone = load_backbone(stored, dtype="float32", device="cpu")
    put(backbone, random_prefix(backbone, 7), folder.settings.folder / "pubs.safetensors", description="new")
    second = folder.find("pubs")
    assert second is not None
    assert (second.reference.length, second.description) == (7, "new")
    assert list(folder.all()) == ["pubs"]
    (folder.settings.folder / "pubs.safetensors").unlink()
    assert folder.find("pubs") is None
    assert folder.all() == {}


def test_files_that_are_not_served(folder: PrefixFolder, stored: Path, random_prefix: Make, tiny_backbone: Make):
    place = folder.settings.folder
    backbone, other = load_backbone(stored, dtype="float32", device="cpu"), tiny_backbone("llama", seed=3)
    (place / "cut.safetensors").write_bytes((place / "pubs.safetensors").read_bytes()[:-9])
    put(other, random_prefix(other, 3), place / "foreign.safetensors")
    put(backbone, random_prefix(backbone, 3), place / "infix.safetensors", placement="infix")
    wide = tiny_backbone("llama", num_hidden_layers=2)
    put(wide, random_prefix(wide, 3), place / "shallow.safetensors")
    (place / "link.safetensors").symlink_to("/etc/hostname")
    (place / "folder.safetensors").mkdir()
    reasons = {
        "cut": "no whole prefix",
        "foreign": "other weights",
        "infix": "stands as 'infix'",
        "shallow": "shapes",
        "link": "out of the folder",
        "folder": "no ordinary file",
    }
    for name, reason in reasons.items():
        with pytest.raises(CheckpointError, match=reason):
            folder.find(name)
    assert list(folder.all()) == ["pubs"]
    sisters = PrefixFolder(Settings.from_vllm(transfer(place, allow_other_backbone=True)), folder.geometry, "tiny", "x")
    assert set(sisters.all()) == {"pubs", "foreign"}


# --- the middleware ---------------------------------------------------------------------------------------------------


class Inner:
    """Stands for vLLM's application: keeps what it is given, and answers with what it is told to."""

    def __init__(self, folder: Path, tokenizer: Any, stored: Path) -> None:
        config = transfer(folder)
        config.model_config = model_config(model=str(stored))
        self.state = SimpleNamespace(
            vllm_config=config,
            args=SimpleNamespace(served_model_name=["base"], model=str(stored), api_key=None),
            engine_client=SimpleNamespace(get_tokenizer=lambda: tokenizer),
            online_renderer=SimpleNamespace(chat_template="{{ " + PLACEHOLDERS_VARIABLE + " }}"),
        )
        self.bodies: list[Any] = []
        self.headers: list[dict[bytes, bytes]] = []
        self.reply: Any = {}
        self.pieces: list[bytes] = []
        self.status = 200

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while scope["method"] == "POST":
            message = await receive()
            body += message["body"]
            if not message["more_body"]:
                break
        if scope["method"] == "POST":
            self.headers.append(dict(scope["headers"]))
            try:
                self.bodies.append(json.loads(body))
            except ValueError:
                self.bodies.append(body)
        kind = b"text/event-stream; charset=utf-8" if self.pieces else b"application/json"
        whole = json.dumps(self.reply).encode()
        headers = [(b"content-type", kind)] + ([] if self.pieces else [(b"content-length", b"%d" % len(whole))])
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        pieces = self.pieces or [whole[:3], whole[3:]]
        for number, piece in enumerate(pieces):
            await send({"type": "http.response.body", "body": piece, "more_body": number < len(pieces) - 1})


@pytest.fixture
def inner(folder: PrefixFolder, tiny_tokenizer: Any, stored: Path) -> Inner:
    shape = load_backbone(stored, dtype="float32", device="cpu").geometry["decoder"]
    made = Inner(folder.settings.folder, tiny_tokenizer, stored)
    made.state.vllm_config.model_config = model_config(
        model=str(stored),
        get_head_size=lambda: shape[0].key_dim,
        get_total_num_kv_heads=lambda: shape[0].num_kv_heads,
        get_total_num_hidden_layers=lambda: len(shape),
    )
    return made


def call(inner: Inner, path: str, body: Any = None, method: str = "POST") -> tuple[int, Any]:
    """Send a request through the middleware; returns status, and the value or the raw stream."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    halves = [(data[:5], True), (data[5:], False)]
    sent: list[Any] = []

    async def receive() -> Any:
        part, more = halves.pop(0)
        return {"type": "http.request", "body": part, "more_body": more}

    async def send(message: Any) -> None:
        sent.append(message)

    app = SimpleNamespace(state=inner.state)
    scope = {"type": "http", "method": method, "path": path, "root_path": "", "app": app}
    scope["headers"] = [(b"content-length", str(len(data)).encode()), (b"authorization", b"Bearer x")]
    asyncio.run(PrefixMiddleware(inner)(scope, receive, send))
    starts = [message for message in sent if message["type"] == "http.response.start"]
    assert len(starts) == 1
    text = b"".join(message.get("body", b"") for message in sent[1:])
    headers = dict(starts[0]["headers"])
    if b"content-length" in headers:
        assert int(headers[b"content-length"]) == len(text)
    return starts[0]["status"], text if inner.pieces else json.loads(text)


def encode(inner: Inner, text: str) -> list[int]:
    ids: list[int] = inner.state.engine_client.get_tokenizer()(text, add_special_tokens=False)["input_ids"]
    return ids


def test_a_completion_becomes_one_of_the_backbone(inner: Inner, folder: PrefixFolder):
    usage = {
        "prompt_tokens": 9,
        "completion_tokens": 3,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 8},
    }
    choice = {"text": "x", "prompt_token_ids": [9] * 5 + [1, 2], "token_ids": [3]}
    inner.reply = {"model": "base", "choices": [choice], "usage": usage, "kv_transfer_params": None}
    body = {"model": "pubs", "prompt": "name", "temperature": 0, "cache_salt": "mine", "add_special_tokens": False}
    status, told = call(inner, "/v1/completions", body)
    (given,) = inner.bodies
    ids = encode(inner, "name")
    assert given["model"] == "base"
    assert given["prompt"][5:] == ids
    assert len(set(given["prompt"][:5])) == 1
    tokenizer = inner.state.engine_client.get_tokenizer()
    assert given["prompt"][0] in tokenizer.all_special_ids
    assert given["prompt"][0] != tokenizer.eos_token_id
    known = folder.find("pubs")
    assert known is not None
    assert PrefixReference.from_kv_transfer_params(given["kv_transfer_params"], b"drawn") == known.reference
    assert given["cache_salt"] == known.reference.cache_salt(b"drawn", "mine")
    assert given["temperature"] == 0
    assert int(inner.headers[0][b"content-length"]) == len(json.dumps(given).encode())
    assert status == 200
    assert told["model"] == "pubs"
    assert told["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 3,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    assert "kv_transfer_params" not in told
    assert told["choices"] == [{**choice, "prompt_token_ids": [1, 2]}]


@pytest.mark.parametrize(
    "prompt", ["ab", ["ab", "cde"], [5, 6, 7], [[5, 6], [7]]], ids=["text", "texts", "ids", "lists of ids"]
)
def test_every_form_of_prompt(inner: Inner, prompt: Any):
    inner.reply = {"model": "base", "choices": [{}], "usage": {"prompt_tokens": 100, "total_tokens": 100}}
    _, told = call(inner, "/v1/completions", {"model": "pubs", "prompt": prompt})
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    given = inner.bodies[0]["prompt"] if several else [inner.bodies[0]["prompt"]]
    wanted = prompt if several else [prompt]
    assert [ids[5:] for ids in given] == [encode(inner, each) if isinstance(each, str) else each for each in wanted]
    assert told["usage"]["prompt_tokens"] == 100 - 5 * len(wanted)


def test_a_stream_is_changed_piece_by_piece(inner: Inner):
    def piece(number: int, **more: Any) -> bytes:
        usage = {"prompt_tokens": 9, "completion_tokens": number, "total_tokens": 9 + number}
        return b"data: " + json.dumps({"id": number, "model": "base", "usage": usage, **more}).encode() + b"\n\n"

    sent = piece(1, choices=[{"text": "ä"}]) + b": alive\n\n" + piece(2, choices=[]) + b"data: [DONE]\n\n"
    # Pieces of the network end anywhere.
    inner.pieces = [sent[:20], sent[20:21], sent[21:90], sent[90:-3], sent[-3:]]
    _, told = call(inner, "/v1/completions", {"model": "pubs", "prompt": ["a", "b"], "stream": True})
    events = told.decode().split("\n\n")
    assert [event for event in events if not event.startswith("data: {")] == [": alive", "data: [DONE]", ""]
    first, last = (json.loads(event[6:]) for event in events if event.startswith("data: {"))
    assert first["model"] == last["model"] == "pubs"
    assert first["choices"] == [{"text": "ä"}]
    # A piece counts its own prompt; the end counts both.
    assert (first["usage"]["prompt_tokens"], last["usage"]["prompt_tokens"]) == (4, -1)


def test_a_chat_gets_placeholders_from_the_template(inner: Inner):
    inner.reply = {"model": "base", "choices": [], "usage": None}
    messages = [{"role": "user", "content": "hello"}]
    call(inner, "/v1/chat/completions", {"model": "pubs", "messages": messages, "chat_template_kwargs": {"x": 1}})
    (given,) = inner.bodies
    assert given["messages"] == messages
    options = given["chat_template_kwargs"]
    assert options["x"] == 1
    assert len(set(encode(inner, options[PLACEHOLDERS_VARIABLE]))) == 1
    assert len(encode(inner, options[PLACEHOLDERS_VARIABLE])) == 5
    inner.state.online_renderer.chat_template = None
    status, told = call(inner, "/v1/chat/completions", {"model": "pubs", "messages": messages})
    assert status == 400
    assert "no variable for their placeholders" in told["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"model": "base", "prompt": "a", "cache_salt": "s"},
        {"model": "unknown", "prompt": "a"},
        {"model": 3},
        {"prompt": "a"},
        [1, 2],
        b"{no json",
    ],
)
def test_what_is_not_for_a_prefix_passes_untouched(inner: Inner, body: Any):
    call(inner, "/v1/completions", body)
    assert inner.bodies == [body]


def test_models_are_listed_with_the_prefixes(inner: Inner):
    inner.reply = {"object": "list", "data": [{"id": "base"}]}
    _, told = call(inner, "/v1/models", method="GET")
    assert [(model["id"], model.get("prefix_length")) for model in told["data"]] == [("base", None), ("pubs", 5)]
    inner.reply, inner.status = {"error": "Unauthorized"}, 401
    assert call(inner, "/v1/models", method="GET") == (401, {"error": "Unauthorized"})


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"echo": True}),
        ("/v1/completions", {"prompt_logprobs": 0}),
        ("/v1/completions", {"truncate_prompt_tokens": 9}),
        ("/v1/completions", {"kv_transfer_params": {"a": 1}}),
        ("/v1/completions", {"cache_salt": 3}),
        ("/v1/completions", {"prompt": ""}),
        ("/v1/completions", {"prompt": {"a": 1}}),
        ("/v1/completions", {"prompt": [True]}),
        ("/v1/completions", {"prompt": ["a"] * 1025}),
        ("/v1/chat/completions", {"chat_template_kwargs": {"truncation": True}}),
        ("/v1/chat/completions", {"chat_template_kwargs": {"tokenize": True}}),
        ("/v1/chat/completions", {"chat_template": "x"}),
        ("/v1/chat/completions", {"chat_template_kwargs": 3}),
        ("/v1/chat/completions", {"add_special_tokens": True}),
    ],
)
def test_what_does_not_go_with_a_prefix(inner: Inner, path: str, fields: dict[str, Any]):
    status, told = call(inner, path, {"model": "pubs", "prompt": "a", **fields})
    assert (status, inner.bodies) == (400, [])
    assert next(iter(fields)) in told["error"]["message"]
    # Who may not come in at all learns nothing.
    inner.state.args.api_key = ["secret"]
    inner.reply, inner.status = {"error": "Unauthorized"}, 401
    assert call(inner, path, {"model": "pubs", "prompt": "a", **fields}) == (401, {"error": "Unauthorized"})
    assert call(inner, path, {"model": "unknown"}) == (401, {"error": "Unauthorized"})
    assert inner.bodies == []


def test_half_a_character_is_no_text(inner: Inner):
    status, told = call(inner, "/v1/completions", b'{"model": "pubs", "prompt": "\\ud800"}')
    assert (status, inner.bodies) == (400, [])
    assert "surrogate" in told["error"]["message"]


def test_a_file_of_a_newer_format(folder: PrefixFolder):
    path = folder.settings.folder / "pubs.safetensors"
    path.write_bytes(path.read_bytes().replace(b'format_version\\": 2', b'format_version\\": 9'))
    with pytest.raises(CheckpointError, match="format version is 9"):
        folder.find("pubs")


def test_a_body_that_is_too_long(inner: Inner):
    inner.state.vllm_config.kv_transfer_config.kv_connector_extra_config["max_body_mib"] = 1
    status, told = call(inner, "/v1/completions", {"model": "pubs", "prompt": "a" * 2**20})
    assert (status, inner.bodies) == (413, [])
    assert "longer" in told["error"]["message"]


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_line(tmp_path: Path):
    start = LaunchConfig(
        "model", tmp_path, "base", max_length=512, chat_template=tmp_path / "t.jinja", more=("--x", "1")
    )
    given = start.arguments()
    assert given[:2] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert given[-2:] == ["--x", "1"]
    told = dict(zip(given[2::2], given[3::2], strict=True))
    assert told["--served-model-name"] == "base"
    assert told["--max-model-len"] == "512"
    assert "--max-num-seqs" not in told
    config = json.loads(told["--kv-transfer-config"])
    assert config["kv_connector_extra_config"] == {"prefixes": str(tmp_path), "cache_mib": 1024}
    write_template(tmp_path / "t.jinja", "{{ messages[0] }}")
    from jinja2 import Template

    template = Template((tmp_path / "t.jinja").read_text())
    assert template.render(messages=["a"]) == "a"
    assert template.render(messages=["a"], **{PLACEHOLDERS_VARIABLE: "##"}) == "##a"
    assert template.render(messages=["a"], **{PLACEHOLDERS_VARIABLE: "##", PROMPT_VARIABLE: "b"}) == "##b"


def serve(*arguments: str, code: int = 2) -> str:
    """What is printed, or why it is refused, by exit code."""
    return run("serve", "--engine", "vllm", *arguments, code=code)[1 if code else 0]


def test_the_command_is_shown_and_refused(stored: Path, tmp_path: Path):
    files = ("--backbone", str(stored), "--prefixes", str(tmp_path))
    shown = serve(*files, "--show-command", "--vllm-args=--enforce-eager", code=0)
    assert f"--model {stored}" in shown
    assert shown.endswith("--enforce-eager\n")
    refused = serve(*files, "--quantize", "int8", "--device", "cpu")
    assert "quantize" in refused
    assert "device" in refused
    missing = serve(*files)
    assert "does not find vllm" in missing
    assert "hint: pip install vllm" in missing
    assert "VLLM_API_KEY is not set" in serve(*files, "--host", "0.0.0.0")
    assert "close every quote" in serve(*files, '--vllm-args="')
    assert "--vllm-args has --host" in serve(*files, "--vllm-args=--host=0.0.0.0")
    assert "no folder" in serve("--backbone", str(stored), "--prefixes", str(tmp_path / "none"))


def test_the_plugin_needs_none_of_the_libraries_that_vllm_pins():
    code = (
        "import sys; import prefixtune.interop.vllm.settings, prefixtune.interop.vllm.middleware;"
        "import prefixtune.interop.vllm.launch;"
        "loaded = {name.partition('.')[0] for name in sys.modules};"
        "print(sorted(loaded & {'transformers', 'peft', 'starlette', 'gguf'}))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "[]\n"


# --- text formats -----------------------------------------------------------------------------------------------------

FORM = {"prompt": "Q: {source}{separator}", "target": " {target} ", "max_length": 60, "longest_target": 20}


@pytest.fixture
def asking(inner: Inner, folder: PrefixFolder, stored: Path, random_prefix: Make, rewrite_header: Make) -> Inner:
    """vLLM's application with prefixes that store a text format: `qa`, and `framed` with words around its targets."""
    backbone = load_backbone(stored, dtype="float32", device="cpu")
    for name, more in (
        ("qa", {"on_too_long": "cut"}),
        ("whole", {"on_too_long": "cut", "longest_prompt": 94}),
        ("wordy", {"on_too_long": "cut", "prompt": "w" * 39 + "{source}{separator}"}),
        ("framed", {"target": "<<{target}>>"}),
        ("hostile", {"prompt": "{source}" * 1500}),
    ):
        path = folder.settings.folder / f"{name}.safetensors"
        put(backbone, random_prefix(backbone, 5), path)
        rewrite_header(path, text_format={**FORM, **more})
    write_template(folder.settings.folder / "t.jinja", "{{ messages[0]['content'] }}")
    inner.state.online_renderer.chat_template = (folder.settings.folder / "t.jinja").read_text()
    inner.reply = {"model": "base", "choices": []}
    return inner


def prompts_of(inner: Inner) -> list[list[int]]:
    """What the model was given last, placeholders left out."""
    given = inner.bodies[-1]["prompt"]
    return [ids[5:] for ids in (given if isinstance(given[0], list) else [given])]


def test_a_text_gets_the_prefixs_own_format(asking: Inner):
    call(asking, "/v1/completions", {"model": "qa", "prompt": ["name", "x"]})
    assert prompts_of(asking) == [encode(asking, "Q: name<s>"), encode(asking, "Q: x<s>")]
    call(asking, "/v1/completions", {"model": "qa", "prompt": [5, 6, 7]})
    assert prompts_of(asking) == [[5, 6, 7]]
    call(asking, "/v1/chat/completions", {"model": "qa", "messages": [{"role": "user", "content": "name"}]})
    options = asking.bodies[-1]["chat_template_kwargs"]
    from jinja2 import Template

    text = Template(asking.state.online_renderer.chat_template).render(messages=[{"content": "no"}], **options)
    assert encode(asking, text)[5:] == encode(asking, "Q: name<s>")
    with pytest.raises(CheckpointError, match="1,500 times"):
        PrefixFolder(
            Settings.from_vllm(asking.state.vllm_config),
            geometry_of(asking.state.vllm_config.model_config),
            "tiny",
        ).find("hostile")
    assert call(asking, "/v1/completions", {"model": "hostile", "prompt": "a"})[0] == 503


def test_completions_are_raw_where_the_server_is_asked(asking: Inner):
    asking.state.vllm_config.kv_transfer_config.kv_connector_extra_config["raw_completions"] = True
    asking.reply = {"model": "base", "choices": [{"text": " a "}]}
    _, told = call(asking, "/v1/completions", {"model": "qa", "prompt": "name"})
    assert prompts_of(asking) == [encode(asking, "name")]
    assert told["choices"] == [{"text": " a "}]


@pytest.mark.parametrize(("name", "written"), [("qa", "  Aromi is  it. "), ("framed", "<< Aromi is  it. >>")])
def test_the_target_alone_comes_back(asking: Inner, name: str, written: str):
    wanted, messages = "Aromi is  it.", [{"role": "user", "content": "name"}]
    asking.reply = {"model": "base", "choices": [{"index": 0, "text": written, "finish_reason": "stop"}]}
    _, told = call(asking, "/v1/completions", {"model": name, "prompt": "name"})
    assert told["choices"][0]["text"] == wanted
    asking.reply["choices"] = [{"index": 0, "message": {"content": written}, "finish_reason": "stop"}]
    _, told = call(asking, "/v1/chat/completions", {"model": name, "messages": messages})
    assert told["choices"][0]["message"]["content"] == wanted

    def events(choice: Callable[[str], Any], ends_alone: bool) -> list[bytes]:
        parts = [written[at : at + 3] for at in range(0, len(written), 3)]
        last = len(parts) - 1
        choices = [
            {"index": n % 2, **choice(part), "finish_reason": "stop" if at == last and not ends_alone else None}
            for at, part in enumerate(parts)
            for n in (0, 1)
        ]
        if ends_alone:
            choices += [{"index": n, "delta": {}, "finish_reason": "stop"} for n in (0, 1)]
        return [b"data: " + json.dumps({"model": "base", "choices": [each]}).encode() + b"\n\n" for each in choices]

    for path, choice, ends_alone in (
        ("/v1/completions", lambda part: {"text": part}, False),
        ("/v1/chat/completions", lambda part: {"delta": {"content": part}}, True),
    ):
        asking.pieces = [*events(choice, ends_alone), b"data: [DONE]\n\n"]
        body = {"model": name, "prompt": "name", "messages": messages, "stream": True, "n": 2}
        _, stream = call(asking, path, body)
        told = [json.loads(event[6:]) for event in stream.decode().split("\n\n") if event.startswith("data: {")]
        for index in (0, 1):
            mine = [each["choices"][0] for each in told if each["choices"][0]["index"] == index]
            texts = [each.get("text") or each.get("delta", {}).get("content") or "" for each in mine]
            assert "".join(texts) == wanted


@pytest.mark.parametrize(("name", "head", "tail"), [("qa", "  ", " "), ("framed", "<< ", " >>")])
def test_offsets_of_tokens_count_within_the_target(asking: Inner, name: str, head: str, tail: str):
    tokens = [*head, "Aro", "mi", " ", "is", " ", " ", "it", ".", *tail]
    raw, logprobs = [len("".join(tokens[:number])) for number in range(len(tokens))], [-1.0] * len(tokens)
    wanted, written = "Aromi is  it.", "".join(tokens)
    offsets = [min(max(offset - len(head), 0), len(wanted)) for offset in raw]
    given = {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": [None] * len(tokens), "text_offset": raw}
    choice = {"index": 0, "text": written, "logprobs": given, "finish_reason": "stop"}
    asking.reply = {"model": "base", "choices": [choice]}
    _, told = call(asking, "/v1/completions", {"model": name, "prompt": "name", "logprobs": 0})
    assert told["choices"][0]["text"] == wanted
    assert told["choices"][0]["logprobs"] == {**given, "text_offset": offsets}
    pieces = []
    for at in range(0, len(tokens), 2):
        part = {key: values[at : at + 2] for key, values in given.items()}
        finished = "stop" if at + 2 >= len(tokens) else None
        choice = {"index": 0, "text": "".join(part["tokens"]), "logprobs": part, "finish_reason": finished}
        pieces.append(b"data: " + json.dumps({"model": "base", "choices": [choice]}).encode() + b"\n\n")
    asking.pieces = [*pieces, b"data: [DONE]\n\n"]
    _, stream = call(asking, "/v1/completions", {"model": name, "prompt": "name", "logprobs": 0, "stream": True})
    events = [json.loads(event[6:]) for event in stream.decode().split("\n\n") if event.startswith("data: {")]
    choices = [event["choices"][0] for event in events]
    assert "".join(choice["text"] for choice in choices) == wanted
    parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    assert [token for part in parts for token in part["tokens"]] == tokens
    assert [offset for part in parts for offset in part["text_offset"]] == offsets


def headers_of(inner: Inner, path: str, body: Any) -> tuple[dict[bytes, bytes], Any]:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    app = SimpleNamespace(state=inner.state)
    scope = {"type": "http", "method": "POST", "path": path, "root_path": "", "app": app, "headers": []}
    asyncio.run(PrefixMiddleware(inner)(scope, receive, send))
    return dict(sent[0]["headers"]), b"".join(message.get("body", b"") for message in sent[1:])


def test_messages_that_a_prefix_cannot_carry(asking: Inner):
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "name"}]
    status, told = call(asking, "/v1/chat/completions", {"model": "qa", "messages": messages})
    assert (status, asking.bodies) == (400, [])
    assert "the chat has 2 messages" in told["error"]["message"]
    for wrong in ([], [{"role": "assistant", "content": "a"}], [{"role": "user", "content": ""}], "a", [3]):
        assert call(asking, "/v1/chat/completions", {"model": "qa", "messages": wrong})[0] == 400
    asking.state.vllm_config.kv_transfer_config.kv_connector_extra_config["earlier_messages"] = "drop"
    headers, _ = headers_of(asking, "/v1/chat/completions", {"model": "qa", "messages": messages})
    assert headers[b"x-prefixtune-dropped-messages"] == b"1"
    # A template from before has no place for the format.
    asking.state.online_renderer.chat_template = "{{ " + PLACEHOLDERS_VARIABLE + " }}"
    status, told = call(asking, "/v1/chat/completions", {"model": "qa", "messages": messages[1:]})
    assert status == 400
    assert "text format" in told["error"]["message"]


def test_long_texts_are_treated_as_in_training(asking: Inner):
    asking.state.vllm_config.model_config.max_model_len = 512
    source = "abcdefghij" * 9
    headers, _ = headers_of(asking, "/v1/completions", {"model": "qa", "prompt": source, "max_tokens": 9})
    assert headers[b"x-prefixtune-cut-tokens"] == b"54"
    whole = encode(asking, f"Q: {source}<s>")
    assert prompts_of(asking) == [[*whole[:39], whole[-1]]]
    # As long as one that training left whole.
    headers, _ = headers_of(asking, "/v1/completions", {"model": "whole", "prompt": source, "max_tokens": 9})
    assert b"x-prefixtune-cut-tokens" not in headers
    assert prompts_of(asking) == [whole]
    # A cut would leave nothing of the source.
    body = {"model": "wordy", "prompt": source, "max_tokens": 9}
    status, told = call(asking, "/v1/completions", body)
    assert (status, "nothing of the source" in told["error"]["message"]) == (400, True)
    asking.bodies.clear()
    for path, model in (("/v1/completions", "framed"), ("/v1/chat/completions", "qa")):
        body = {"model": model, "prompt": source, "messages": [{"role": "user", "content": source}]}
        assert call(asking, path, body)[0] == 400
    assert asking.bodies == []
