"""A side of `bench.serve`, in a process of its own: reads requests, one JSON line each, and answers each.

A line has `prompts` and, for each, the number of its prefix in `prefixes` (null: none). An answer has the seconds of it
all, until each first token and between tokens, and the tokens. The side `llama` needs `xllamacpp` alone, so that it
runs in an environment of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

Receive = Callable[[int, list[int]], None]
"""Takes new tokens of a prompt."""
Answer = Callable[[list[list[int]], list[int | None], Receive], None]
"""Continues prompts, each with a prefix or none, all at once."""

START_SECONDS = 600


def engine(options: argparse.Namespace) -> Answer:
    """This project's engine."""
    from bench.models import cache_mib, make_backbone
    from prefixtune.backbone.prefixes import load_prefix
    from prefixtune.engine.config import EngineConfig
    from prefixtune.engine.engine import Engine
    from prefixtune.engine.request import Request, SamplingParams

    backbone = make_backbone(options.model, options.dtype, options.device)
    # An earlier version, as `--before` runs it, has no such option.
    sizes = {"kv_cache_mib": cache_mib(backbone, options.texts, options.max_length)} if options.small_cache else {}
    engine = Engine(backbone, EngineConfig(num_slots=options.texts, max_length=options.max_length, **sizes))
    sampling = SamplingParams(max_new_tokens=options.new, min_new_tokens=options.new)
    # p0.safetensors, p1.safetensors, ...
    files = sorted(Path(options.prefixes).glob("p*.safetensors"), key=lambda path: int(path.stem[1:]))
    prefixes = [load_prefix(path, backbone) for path in files]

    def answer(prompts: list[list[int]], chosen: list[int | None], receive: Receive) -> None:
        numbers = {}
        for number, (prompt, prefix) in enumerate(zip(prompts, chosen, strict=True)):
            request = Request(tuple(prompt), None if prefix is None else prefixes[prefix], sampling)
            engine.add(request)
            numbers[request.id] = number
        while engine.busy:
            for output in engine.step():
                if output.error:
                    raise RuntimeError(output.error)
                receive(numbers[output.request_id], [token.id for token in output.tokens])

    return answer


def transformers(options: argparse.Namespace) -> Answer:
    """The `generate` of transformers on its own model, one batch, no prefix."""
    import torch
    from transformers import GenerationConfig

    from bench.models import make_model

    model = make_model(options.model, options.dtype, options.device)
    end = model.config.eos_token_id
    config = GenerationConfig(
        max_new_tokens=options.new, min_new_tokens=options.new, do_sample=False, eos_token_id=end, pad_token_id=end
    )

    def answer(prompts: list[list[int]], chosen: list[int | None], receive: Receive) -> None:
        ids = torch.tensor(prompts, device=model.device)
        with torch.inference_mode():
            output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        for number, row in enumerate(output[:, ids.shape[1] :].tolist()):
            receive(number, row)

    return answer


def vllm(options: argparse.Namespace) -> Answer:
    """`prefixtune serve --engine vllm`, in vLLM's own environment, which gets all requests at once."""
    url = f"http://127.0.0.1:{free_port()}"
    words = ["--engine", "vllm", "--vllm-python", options.vllm_python, "--backbone", options.model]
    words += ["--backbone-id", "m", "--prefixes", options.prefixes, "--dtype", options.dtype]
    words += ["--max-length", str(options.max_length), "--port", url.rpartition(":")[2]]
    server = subprocess.Popen(
        [sys.executable, "-m", "prefixtune", "serve", *words, f"--vllm-args=--max-num-seqs {options.texts}"],
        stdout=sys.stderr,
        env={"VLLM_CPU_KVCACHE_SPACE": "2", **os.environ, "HF_HUB_OFFLINE": "1"},
    )
    end = time.monotonic() + START_SECONDS
    while not _is_ready(f"{url}/health"):
        if server.poll() is not None or time.monotonic() > end:
            server.terminate()
            raise RuntimeError("vLLM did not start.")
        time.sleep(1)

    def complete(prompt: list[int], prefix: int | None) -> list[int]:
        settings = {"max_tokens": options.new, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        body = {"model": "m" if prefix is None else f"p{prefix}", "prompt": prompt, **settings}
        with _post(f"{url}/v1/completions", body) as response:
            ids: list[int] = json.load(response)["choices"][0]["token_ids"]
        return ids

    def answer(prompts: list[list[int]], chosen: list[int | None], receive: Receive) -> None:
        with ThreadPoolExecutor(len(prompts)) as pool:
            for number, ids in enumerate(pool.map(complete, prompts, chosen)):
                receive(number, ids)

    return answer


def llama(options: argparse.Namespace) -> Answer:
    """llama.cpp's server on a GGUF file."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.n_ctx, params.n_parallel, params.port, params.verbosity = (
        options.max_length * options.texts,
        options.texts,
        0,
        0,
    )
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    server = xllamacpp.Server(params)

    def answer(prompts: list[list[int]], chosen: list[int | None], receive: Receive) -> None:
        def complete(number: int) -> None:
            settings = {"temperature": 0, "n_predict": options.new, "ignore_eos": True, "cache_prompt": False}
            body = {"prompt": prompts[number], "stream": True, "return_tokens": True, **settings}
            with _post(f"{server.listening_address}/completion", body) as response:
                for line in response:
                    if line.startswith(b"data: {"):
                        receive(number, json.loads(line[6:])["tokens"])

        with ThreadPoolExecutor(len(prompts)) as pool:
            list(pool.map(complete, range(len(prompts))))

    return answer


SIDES = {"engine": engine, "transformers": transformers, "vllm": vllm, "llama": llama}


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def _is_ready(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as response:
        return bool(response.status == 200)
    return False


def _post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=START_SECONDS)


def timed(answer: Answer, prompts: list[list[int]], prefixes: list[int | None]) -> dict[str, Any]:
    """The new tokens, and the seconds of it all, until each first token and between tokens."""
    times: list[list[float]] = [[] for _ in prompts]
    tokens: list[list[int]] = [[] for _ in prompts]
    began = time.perf_counter()

    def receive(number: int, new: list[int]) -> None:
        times[number] += [time.perf_counter() - began] * len(new)
        tokens[number] += new

    answer(prompts, prefixes, receive)
    return {
        "seconds": time.perf_counter() - began,
        "first": [stamps[0] for stamps in times if stamps],
        "between": [b - a for stamps in times for a, b in itertools.pairwise(stamps)],
        "tokens": tokens,
    }


def make_side_parser() -> argparse.ArgumentParser:
    """The options of a side."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--model", required=True, help="backbone; of llama, a GGUF file")
    parser.add_argument("--new", type=int, required=True, help="tokens to generate")
    parser.add_argument("--texts", type=int, default=1, help="at once")
    parser.add_argument("--max-length", type=int, default=512, help="most positions of a text")
    parser.add_argument("--prefixes", default="", help="their folder")
    parser.add_argument("--small-cache", action="store_true", help="memory for keys and values of just these texts")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--vllm-python", default="")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Load, say that it is ready, and answer until the input ends."""
    options = make_side_parser().parse_args(arguments)
    answers, sys.stdout = sys.stdout, sys.stderr
    if options.side != "llama" and options.threads:
        import torch

        torch.set_num_threads(options.threads)
    answer = SIDES[options.side](options)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(timed(answer, asked["prompts"], asked["prefixes"])), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
