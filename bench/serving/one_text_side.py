"""A side of `bench.serving.one_text`, in a process of its own: reads prompts, one JSON line each, and answers each.

An answer is a line with the seconds until each token, and the tokens. The side `llama` needs `xllamacpp` alone, so that
it runs in an environment of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

Answer = Callable[[list[int], Callable[[list[int]], None]], None]
"""Continues a prompt, and passes each new token on."""


class _Tokens:
    """A streamer of transformers."""

    def __init__(self, receive: Callable[[list[int]], None]) -> None:
        self._receive, self._prompt_seen = receive, False

    def put(self, value: Any) -> None:
        if self._prompt_seen:
            self._receive(value.reshape(-1).tolist())
        self._prompt_seen = True

    def end(self) -> None:
        pass


def engine(options: argparse.Namespace) -> Answer:
    """This project's engine with one request at a time."""
    from prefixtune.backbone.load import load_backbone
    from prefixtune.engine.engine import Engine
    from prefixtune.engine.request import Request, SamplingParams

    engine = Engine(load_backbone(options.model, dtype="bfloat16", quantize=options.quantize))
    sampling = SamplingParams(max_new_tokens=options.new, min_new_tokens=options.new)

    def answer(prompt: list[int], receive: Callable[[list[int]], None]) -> None:
        engine.add(Request(tuple(prompt), None, sampling))
        while engine.busy:
            for output in engine.step():
                receive([token.id for token in output.tokens])

    return answer


def generate(options: argparse.Namespace) -> Answer:
    """This project's `generate`."""
    from prefixtune.backbone.load import load_backbone
    from prefixtune.inference.config import GenerateConfig
    from prefixtune.inference.generate import write
    from prefixtune.inference.prompts import Prompt

    backbone = load_backbone(options.model, dtype="bfloat16", quantize=options.quantize)
    config = GenerateConfig(max_new_tokens=options.new, min_new_tokens=options.new)

    def answer(prompt: list[int], receive: Callable[[list[int]], None]) -> None:
        for _, output in write(backbone, [Prompt(prompt, None, options.new)], config):
            receive([token.id for token in output.tokens])

    return answer


def transformers(options: argparse.Namespace) -> Answer:
    """The `generate` of transformers on its own model."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from bench.peft_setup import model_folder

    model: Any = AutoModelForCausalLM.from_pretrained(model_folder(options.model), dtype=torch.bfloat16).eval()
    end = model.config.eos_token_id
    config = GenerationConfig(
        max_new_tokens=options.new, min_new_tokens=options.new, do_sample=False, eos_token_id=end, pad_token_id=end
    )

    def answer(prompt: list[int], receive: Callable[[list[int]], None]) -> None:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                streamer=_Tokens(receive),
            )

    return answer


def llama(options: argparse.Namespace) -> Answer:
    """llama.cpp's server on a GGUF file."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.n_ctx, params.n_parallel, params.port, params.verbosity = 1024, 1, 0, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    server = xllamacpp.Server(params)

    def answer(prompt: list[int], receive: Callable[[list[int]], None]) -> None:
        settings = {"temperature": 0, "n_predict": options.new, "ignore_eos": True, "cache_prompt": False}
        body = json.dumps({"prompt": prompt, "stream": True, "return_tokens": True, **settings}).encode()
        request = urllib.request.Request(
            f"{server.listening_address}/completion", body, {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    receive(json.loads(line[6:])["tokens"])

    return answer


SIDES = {"engine": engine, "generate": generate, "transformers": transformers, "llama": llama}


def _timed(answer: Answer, prompt: list[int]) -> dict[str, list[Any]]:
    """The new tokens, and the seconds until each."""
    seconds: list[float] = []
    tokens: list[int] = []
    began = time.perf_counter()

    def receive(new: list[int]) -> None:
        seconds.extend(itertools.repeat(time.perf_counter() - began, len(new)))
        tokens.extend(new)

    answer(prompt, receive)
    return {"seconds": seconds, "tokens": tokens}


def main(arguments: Sequence[str] | None = None) -> int:
    """Load, say that it is ready, and answer until the input ends."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--model", required=True, help="backbone; of llama, a GGUF file")
    parser.add_argument("--new", type=int, required=True, help="tokens to generate")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--quantize", default="")
    options = parser.parse_args(arguments)
    answers, sys.stdout = sys.stdout, sys.stderr
    if options.side != "llama":
        import torch

        torch.set_num_threads(options.threads)
    answer = SIDES[options.side](options)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_timed(answer, json.loads(line))), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
