"""llama.cpp as an engine: the default model's weights, written as float16, give the torch engine's tokens."""

import copy
import dataclasses
import functools
import json
import os
import signal
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench.quantized import write_gguf
from command_line import run as run_command
from engine_runs import submit
from prefixtune.attention.record import prefix_from_tokens
from prefixtune.backbone.convert import read_gguf
from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.packaged import packaged_gguf
from prefixtune.backbone.prefixes import load_prefix, make_header
from prefixtune.backbone.shapes import StoredWeights, load_shapes
from prefixtune.engine import TorchEngine
from prefixtune.engine.gguf import find_gguf
from prefixtune.engine.llama_cpp import LlamaCppEngine
from prefixtune.engine.remote_server import RemoteServer
from prefixtune.engine.request import Request, SamplingParams
from prefixtune.errors import BackboneError, ConfigError, ContextLengthError, PrefixError, RequestError
from prefixtune.inference.generate import generate, stream
from prefixtune.prefix.prefix import Prefix, save_prefix
from prefixtune.sampling.grammar import compile_json_schema

pytest.importorskip("xllamacpp", reason="needs xllamacpp")

NAME = "smollm2-135m"
FACTS = (
    "The night train to Stonehill leaves platform B at nineteen fifteen. Anna is the driver. The dog is called Rusty.",
    "The capital of Narnia is Cair Paravel, and Peter is its king. It snows there for a hundred years.",
)
ASKED = (
    "Question: What is the dog called? Answer:",
    "Question: Who is the king? Answer:",
    "The capital of France is",
    "Once upon a time",
    "train : Fox | to : Redcliff | time :",
)


@pytest.fixture(scope="module", autouse=True)
def files_are_read_once():
    """Every start reads the file's vocabulary, which takes more than a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prefixtune.engine.gguf.read_gguf", functools.cache(read_gguf))
        yield


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """The default model in float16: 270 MB, written once."""
    source = packaged_gguf(NAME)
    if source is None:
        pytest.skip("needs the default model's GGUF file: `prefixtune prepare --force`")
    return write_gguf(source, tmp_path_factory.mktemp("gguf") / "float16.gguf", "F16")


@pytest.fixture(scope="module")
def shapes():
    """The default model without its weights."""
    return load_shapes(NAME)


@pytest.fixture(scope="module")
def torch_backbone():
    """The default model in float32."""
    return load_backbone(NAME, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def prefixes(torch_backbone):
    """What two texts leave in the cache."""
    ids = [torch.tensor([torch_backbone.encode(text)]) for text in FACTS]
    return [prefix_from_tokens(torch_backbone.model, torch_backbone.layout, one) for one in ids]


@pytest.fixture(scope="module")
def engine(shapes, gguf):
    """Four slots."""
    with LlamaCppEngine(shapes, str(gguf), num_slots=4, max_length=256, threads=1) as made:
        yield made


def test_mixed_prefixes_give_the_torch_engines_tokens(engine, torch_backbone, prefixes):
    def requests():
        return [
            Request(tuple(torch_backbone.encode(text)), prefix, SamplingParams(max_new_tokens=24))
            for text in ASKED
            for prefix in (*prefixes, None)
        ]

    wanted = [outputs[0] for outputs in TorchEngine(torch_backbone, num_slots=4).run(requests())]
    # The second time, slots hold prefixes already.
    for _ in range(2):
        found = [outputs[0] for outputs in submit(engine, requests())]
        same = sum(
            [t.id for t in one.tokens] == [t.id for t in other.tokens] for one, other in zip(found, wanted, strict=True)
        )
        assert same >= 0.9 * len(wanted)
        assert {one.finish_reason for one in found} <= {"stop", "length"}


def test_generate_and_stream_take_it(engine, torch_backbone, prefixes):
    texts, mixed = list(ASKED), [*prefixes, None, None, prefixes[0]]
    wanted = generate(torch_backbone, texts, mixed, max_new_tokens=12)
    found = generate(engine.backbone, texts, mixed, max_new_tokens=12, engine=engine)
    assert sum(one == other for one, other in zip(found, wanted, strict=True)) >= len(texts) - 1
    pieces = list(stream(engine.backbone, texts[0], mixed[0], max_new_tokens=12, engine=engine))
    assert len(pieces) > 1
    assert "".join(pieces) == found[0]
    with pytest.raises(ConfigError):
        generate(engine.backbone, texts, num_beams=2, engine=engine)
    # Nobody reads on: it is cancelled.
    next(stream(engine.backbone, texts[3], max_new_tokens=200, engine=engine))
    deadline = time.monotonic() + 20
    while engine.num_unfinished and time.monotonic() < deadline:
        time.sleep(0.05)
    assert engine.num_unfinished == 0


def test_commands_take_it(gguf, torch_backbone, prefixes, tmp_path):
    file, data = tmp_path / "p.safetensors", tmp_path / "data.jsonl"
    save_prefix(file, Prefix(prefixes[0].layers, make_header(torch_backbone, task="e2e")))
    data.write_text(json.dumps({"source": ASKED[0], "target": "Rusty"}) + "\n")
    # Beams and a least number of tokens, which are the task's, are left out.
    llama = ("--engine", "llama.cpp", "--gguf", str(gguf), "--threads", "1", "--max-new-tokens", "8")
    llama += ("--prefix", str(file))
    text, _ = run_command("generate", *llama, ASKED[0])
    (wanted,) = generate(torch_backbone, [ASKED[0]], load_prefix(file), max_new_tokens=8, ban_newlines=True)
    assert text.strip() == wanted
    row = json.loads(run_command("generate", *llama, "--json", ASKED[0])[0])
    assert row["output"] == wanted
    answers = run_command("chat", *llama, "--json", stdin="Hello\nWho?\n")[0].splitlines()
    assert [json.loads(answer)["prefix"] for answer in answers] == ["p", "p"]
    folder = tmp_path / "out"
    options = ("--task", "records", "--data", str(data), "--metrics", "bleu", "--output", str(folder), "--json")
    scores = json.loads(run_command("evaluate", *llama, *options)[0])
    assert scores["num_examples"] == 1
    assert "F16" in (folder / "evaluation.json").read_text()
    for wrong in (("generate", *llama, "--num-beams", "2", "x"), ("generate", *llama, "--dtype", "float32", "x")):
        run_command(*wrong, code=2)
    run_command("generate", "--gguf", str(gguf), "x", code=2)


def test_logprobs_stops_seeds_and_several_texts(engine, torch_backbone):
    prompt = tuple(torch_backbone.encode(ASKED[3]))
    greedy = Request(prompt, None, SamplingParams(max_new_tokens=4, logprobs=2))
    (found,), (wanted,) = submit(engine, [greedy])[0], TorchEngine(torch_backbone, num_slots=1).run([greedy])[0]
    for one, other in zip(found.tokens, wanted.tokens, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=0.02)
        assert [token for token, _ in one.top_logprobs] == [token for token, _ in other.top_logprobs]
    sampling = SamplingParams(max_new_tokens=12, temperature=1.0, seed=3, stop=("e",))
    # Beside another text, numbers round differently: one at a time.
    drawn = [submit(engine, [Request(prompt, None, sampling)])[0][0].text for _ in range(2)]
    assert drawn[0] == drawn[1]
    several = [text.text for text in submit(engine, [Request(prompt, None, sampling, n=3)])[0]]
    assert len(set(several)) > 1
    assert not any("e" in text for text in several)


@pytest.mark.parametrize(
    ("sampling", "error"),
    [
        ({"frequency_penalty": 1.0}, RequestError),
        ({"min_new_tokens": 2}, RequestError),
        ({"prompt_logprobs": 1}, RequestError),
        ({"max_new_tokens": 1000}, ContextLengthError),
    ],
)
def test_what_it_does_not_have_is_refused(engine, shapes, sampling, error):
    request = Request(tuple(shapes.encode("a")), None, SamplingParams(**sampling))
    with pytest.raises(error):
        engine.submit(request, lambda output: None)


def test_deadlines_and_cancelling(engine, shapes):
    found = {}
    done = threading.Semaphore(0)

    def receive(output):
        if output.finish_reason is not None:
            found[output.request_id] = output.finish_reason
            done.release()

    long = SamplingParams(max_new_tokens=200, banned=(shapes.eos_id,))
    late, unwanted = (Request(tuple(shapes.encode("a")), None, long) for _ in range(2))
    engine.submit(late, receive, deadline=0.3)
    engine.submit(unwanted, receive)
    engine.cancel(unwanted.id)
    assert done.acquire(timeout=20)
    assert done.acquire(timeout=20)
    assert found == {late.id: "timeout", unwanted.id: "cancelled"}


def test_prefixes_that_do_not_fit_are_refused_and_hurt_nobody(engine, shapes, prefixes):
    prompt, few = tuple(shapes.encode("a")), SamplingParams(max_new_tokens=2)
    large = prefixes[0]._mapped(lambda tensor: tensor * 0 + 1e6)
    foreign = replace(prefixes[0], header={"backbone": {"name": "other", "fingerprint": "1:2:3"}})
    for prefix, error in ((large, ConfigError), (foreign, BackboneError)):
        for _ in range(6):
            with pytest.raises(error):
                engine.submit(Request(prompt, prefix, few), lambda output: None)
    assert engine.num_unfinished == 0
    assert len(submit(engine, [Request(prompt, prefixes[0], few) for _ in range(5)])) == 5


def test_a_state_that_is_gone_is_written_again(engine, shapes, prefixes):
    request = Request(tuple(shapes.encode(ASKED[0])), prefixes[0], SamplingParams(max_new_tokens=4))
    wanted = submit(engine, [request])[0][0].text
    for slot in engine._slots:
        slot.file = None
    for path in engine._files.folder.glob("*.safetensors"):
        path.unlink()
    assert submit(engine, [replace(request, id="again")])[0][0].text == wanted


def test_characters_of_several_tokens(engine, shapes):
    pytest.importorskip("llguidance", reason="needs llguidance")
    schema = {"const": "a \U0001f980 \u65e5\u672c"}
    grammar = compile_json_schema(shapes, schema)
    request = Request(tuple(shapes.encode("JSON:")), None, SamplingParams(max_new_tokens=40), grammar=grammar)
    found = submit(engine, [request])[0][0]
    assert found.text == f'"{schema["const"]}"'
    assert shapes.decode([token.id for token in found.tokens]) == found.text
    assert found.finish_reason == "stop"


def test_lengths(engine, shapes, prefixes):
    prompt = tuple(shapes.encode(ASKED[0]))
    most = engine.available_tokens(len(prompt), prefixes[0].length())
    for length in (0, 1, most):
        sampling = SamplingParams(max_new_tokens=length, banned=(shapes.eos_id,), logprobs=0)
        found = submit(engine, [Request(prompt, prefixes[0], sampling)])[0][0]
        assert len(found.tokens) == length
        assert found.finish_reason == "length"
        assert not any(token.top_logprobs for token in found.tokens)


def test_a_callback_that_fails_is_not_called_again(engine, shapes):
    calls = []

    def receive(output):
        calls.append(output)
        raise ValueError

    sampling = SamplingParams(max_new_tokens=60, banned=(shapes.eos_id,))
    engine.submit(Request(tuple(shapes.encode("a")), None, sampling, n=1), receive)
    deadline = time.monotonic() + 20
    while engine.num_unfinished and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(calls) == 1
    assert calls[0].finish_reason is None


def test_what_cannot_start_is_refused(shapes, gguf, tmp_path, monkeypatch):
    with pytest.raises(ConfigError):
        LlamaCppEngine(shapes, str(gguf), num_slots=257)
    with pytest.raises(BackboneError):
        LlamaCppEngine(shapes, str(tmp_path / "none.gguf"), num_slots=1, max_length=64)
    monkeypatch.setattr("prefixtune.engine.prefix_files.cache_folder", lambda: gguf)
    with pytest.raises(PrefixError):
        LlamaCppEngine(shapes, str(gguf))
    monkeypatch.setattr(shapes.model.config, "model_type", "other")
    with pytest.raises(BackboneError):
        LlamaCppEngine(shapes, str(gguf))


def test_states_go_with_their_engine(shapes, gguf, tmp_path, monkeypatch):
    monkeypatch.setattr("prefixtune.engine.prefix_files.cache_folder", lambda: tmp_path)
    with LlamaCppEngine(shapes, str(gguf), num_slots=1, max_length=64, threads=1):
        assert list((tmp_path / "engines").iterdir())
    assert not list((tmp_path / "engines").iterdir())


def test_a_server_that_dies_is_started_again_once(shapes, gguf):
    with LlamaCppEngine(shapes, str(gguf), num_slots=1, max_length=128, threads=1) as engine:
        failed = threading.Event()
        engine.on_failure = failed.set
        ended = threading.Event()
        outputs = []

        def receive(output):
            outputs.append(output)
            if output.finish_reason is not None:
                ended.set()
            elif len(outputs) == 1:
                # In the middle of a text.
                os.kill(engine._server.process.pid, signal.SIGKILL)

        request = Request(tuple(shapes.encode("a")), None, SamplingParams(max_new_tokens=100, banned=(shapes.eos_id,)))
        engine.submit(request, receive)
        assert ended.wait(20)
        assert outputs[-1].finish_reason == "error"
        assert outputs[-1].engine_crashed
        deadline = time.monotonic() + 60
        while not engine.healthy and time.monotonic() < deadline:
            time.sleep(0.1)
        short = Request(tuple(shapes.encode("a")), None, SamplingParams(max_new_tokens=2))
        assert submit(engine, [short])[0][0].finish_reason in ("stop", "length")
        os.kill(engine._server.process.pid, signal.SIGKILL)
        assert failed.wait(20)
        assert engine.failed
        assert not engine.healthy


def test_files_of_other_models_and_no_files_are_refused(shapes, tmp_path, monkeypatch):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF and nothing else")
    for path in (broken, tmp_path / "none.gguf"):
        with pytest.raises(BackboneError):
            find_gguf(str(path), shapes)
    row, scale = StoredWeights.row, torch.linspace(1, 1.05, shapes.hidden_size)
    with monkeypatch.context() as patch:
        # Trained further.
        patch.setattr("prefixtune.engine.gguf.StoredWeights.row", lambda *which: row(*which) * scale)
        with pytest.raises(BackboneError):
            find_gguf("", shapes)
    weights = shapes.model.get_input_embeddings().weight
    monkeypatch.setattr("prefixtune.engine.gguf.StoredWeights.row", lambda *_: torch.randn(weights.shape[1]))
    with pytest.raises(BackboneError):
        find_gguf("", shapes)


def test_a_build_that_restores_nothing_is_refused(shapes, gguf, monkeypatch):
    ask = RemoteServer.ask

    async def no_restore(self, path, body):
        return None if path.endswith("action=restore") else await ask(self, path, body)

    monkeypatch.setattr(RemoteServer, "ask", no_restore)
    with pytest.raises(ConfigError):
        LlamaCppEngine(shapes, str(gguf), num_slots=2, max_length=128, threads=1)


def test_a_window_that_would_hide_the_prefix_is_refused(shapes, gguf):
    config = copy.deepcopy(shapes.model.config)
    config.sliding_window = 64
    other = dataclasses.replace(shapes, model=SimpleNamespace(config=config))
    with pytest.raises(BackboneError):
        LlamaCppEngine(other, str(gguf), num_slots=1, max_length=128)
