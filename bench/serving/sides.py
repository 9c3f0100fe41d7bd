"""The sides of the serving benchmark: each answers the same prompts in its own way."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch

from bench.peft_setup import model_folder, silence_peft
from prefixtune.attention.cache import cache_argument
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.prefixes import make_header
from prefixtune.engine.request import Request, SamplingParams, SequenceOutput
from prefixtune.engine.worker import EngineWorker
from prefixtune.inference.beams import search
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.prompts import Prompt
from prefixtune.prefix.prefix import Prefix, flatten, save_prefix

PREFIX_LENGTH = 10

Tokens = list[list[int]]


class Side(Protocol):
    """One way to serve requests."""

    def serve(self, prompts: Sequence[Sequence[int]]) -> Tokens:
        """Answer all prompts; the new tokens of each."""


class EngineSide:
    """An engine that runs in a thread and gets all requests at once."""

    def __init__(self, worker: EngineWorker, prefixes: Sequence[Prefix | None], new: int) -> None:
        self.worker, self.prefixes = worker, prefixes
        self.sampling = SamplingParams(max_new_tokens=new, min_new_tokens=new)
        self.first: list[float] = []
        self.between: list[float] = []

    def serve(self, prompts: Sequence[Sequence[int]]) -> Tokens:
        """All requests; records when their tokens came."""
        times: list[list[float]] = [[] for _ in prompts]
        outputs: Tokens = [[] for _ in prompts]
        finished = threading.Semaphore(0)
        began = time.perf_counter()
        for index, (prompt, prefix) in enumerate(zip(prompts, self.prefixes, strict=True)):

            def receive(output: SequenceOutput, index: int = index) -> None:
                if output.tokens:
                    times[index].append(time.perf_counter())
                    outputs[index] += [token.id for token in output.tokens]
                if output.finish_reason is not None:
                    finished.release()

            self.worker.submit(Request(tuple(prompt), prefix, self.sampling), receive)
        for _ in prompts:
            finished.acquire()
        self.first = [stamps[0] - began for stamps in times if stamps]
        self.between = [b - a for stamps in times for a, b in itertools.pairwise(stamps)]
        return outputs


class GenerateSide:
    """transformers' `generate`, all requests in one batch with one prefix."""

    def __init__(self, backbone: Backbone, prefix: Prefix, new: int) -> None:
        self.backbone, self.prefix, self.new = backbone, prefix, new

    def serve(self, prompts: Sequence[Sequence[int]]) -> Tokens:
        """All requests."""
        config = GenerateConfig(max_new_tokens=self.new, min_new_tokens=self.new, batch_size=len(prompts))
        texts = [Prompt(list(prompt), self.prefix, self.new) for prompt in prompts]
        return [ids for _, ids in sorted(search(self.backbone, texts, range(len(texts)), config))]


class PeftSide:
    """PEFT with one adapter per prefix on one model: switch, make the prompt, generate, one request after another.

    PEFT 0.21 ignores its prefix in `generate()` under transformers 5.24, which renamed an argument. So that it does the
    same work, its own prompt (`set_adapter`, then `get_prompt`) is passed to the model's `generate` as a filled cache,
    as its `generate` was meant to do. It takes one request at a time, since a batch has one adapter.
    """

    def __init__(self, backbone_name: str, dtype: torch.dtype, prefixes: Sequence[Prefix], new: int) -> None:
        from peft import PrefixTuningConfig, get_peft_model
        from transformers import AutoModelForCausalLM, GenerationConfig

        silence_peft()
        model = AutoModelForCausalLM.from_pretrained(model_folder(backbone_name), dtype=dtype).eval()
        config = PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=PREFIX_LENGTH, prefix_projection=False, inference_mode=True
        )
        self.peft = get_peft_model(model, config, adapter_name="0")
        for index in range(1, len(prefixes)):
            self.peft.add_adapter(str(index), config)
        with torch.no_grad():
            for index, prefix in enumerate(prefixes):
                weight = self.peft.prompt_encoder[str(index)].embedding.weight
                weight.copy_(flatten(prefix.layers["decoder"]))
        self.peft.eval()
        eos_id = model.config.eos_token_id
        self.config = GenerationConfig(
            max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=eos_id, pad_token_id=eos_id
        )
        self.cache = cache_argument(model)

    @torch.inference_mode()
    def serve(self, prompts: Sequence[Sequence[int]]) -> Tokens:
        """All requests."""
        outputs = []
        for index, prompt in enumerate(prompts):
            self.peft.set_adapter(str(index))
            # Ids and mask must include the positions that the cache already holds.
            ids = torch.tensor([[self.config.pad_token_id] * PREFIX_LENGTH + list(prompt)])
            output = self.peft.get_base_model().generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=self.config,
                **{self.cache: self.peft.get_prompt(batch_size=1)},
            )
            outputs.append(output[0, ids.shape[1] :].tolist())
        return outputs


def save_prefixes(folder: Path, backbone: Backbone, prefixes: Sequence[Prefix]) -> None:
    """Write prefixes as p0.safetensors, p1.safetensors, ..."""
    for index, prefix in enumerate(prefixes):
        save_prefix(folder / f"p{index}.safetensors", Prefix(prefix.layers, make_header(backbone)))


class VllmServer:
    """`prefixtune serve --engine vllm`, in vLLM's own environment, over a folder of prefixes."""

    def __init__(self, python: Path, backbone: Backbone, prefixes: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115
        slots = sum(1 for _ in prefixes.iterdir())
        options = ["--engine", "vllm", "--vllm-python", str(python), "--backbone", backbone.name, "--backbone-id", "m"]
        options += ["--prefixes", str(prefixes), "--dtype", "bfloat16", "--max-length", "512", "--port", str(port)]
        source = Path(__file__).resolve().parents[2] / "src"
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "prefixtune",
                "serve",
                *options,
                f"--vllm-args=--max-num-seqs {slots}",
            ],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(source)},
            start_new_session=True,
        )
        end = time.monotonic() + 300
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
                if response.status == 200:
                    os.killpg(self.process.pid, signal.SIGSTOP)
                    return
            time.sleep(1)
        self.close()
        raise SystemExit(f"vLLM did not start:\n{Path(self.log.name).read_text(encoding='utf-8')[-3000:]}")

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Let it run during the block only: even idle it would keep a core busy that another side needs."""
        os.killpg(self.process.pid, signal.SIGCONT)
        try:
            yield
        finally:
            os.killpg(self.process.pid, signal.SIGSTOP)

    def close(self) -> None:
        """End the server and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
            os.killpg(self.process.pid, signal.SIGCONT)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)


class VllmSide:
    """vLLM's server, which gets all requests at once, each for a model of its own."""

    def __init__(self, server: VllmServer, models: Sequence[str], new: int) -> None:
        self.server, self.models, self.new = server, models, new

    def serve(self, prompts: Sequence[Sequence[int]]) -> Tokens:
        """All requests."""
        with self.server.running(), ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(self._complete, self.models, prompts))

    def _complete(self, model: str, prompt: Sequence[int]) -> list[int]:
        settings = {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": self.new,
            "temperature": 0,
            "ignore_eos": True,
        }
        body = json.dumps({**settings, "return_token_ids": True}).encode()
        request = urllib.request.Request(
            f"{self.server.url}/v1/completions", body, {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            ids: list[int] = json.load(response)["choices"][0]["token_ids"]
        return ids
