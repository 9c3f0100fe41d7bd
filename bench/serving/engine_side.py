"""An engine in a process of its own, for `bench.serving.serve`: another version's.

Reads prompts, a JSON line for all of them, serves them at once, each with its prefix, and answers with the new tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Load, say that it is ready, and answer until the input ends."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="backbone")
    parser.add_argument("--prefixes", type=Path, required=True, help="folder with p0.safetensors, p1.safetensors, ...")
    parser.add_argument("--requests", type=int, required=True)
    parser.add_argument("--new", type=int, required=True, help="tokens to generate")
    options = parser.parse_args(arguments)
    answers, sys.stdout = sys.stdout, sys.stderr

    from prefixtune.backbone.load import load_backbone
    from prefixtune.backbone.prefixes import load_prefix
    from prefixtune.engine.config import EngineConfig
    from prefixtune.engine.engine import Engine
    from prefixtune.engine.request import Request, SamplingParams

    backbone = load_backbone(options.model, dtype="bfloat16", device="cpu")
    names = [options.prefixes / f"p{index}.safetensors" for index in range(options.requests)]
    prefixes = [load_prefix(name, backbone).to(backbone.dtype) for name in names]
    engine = Engine(backbone, EngineConfig(num_slots=options.requests))
    sampling = SamplingParams(max_new_tokens=options.new, min_new_tokens=options.new)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        requests = [
            Request(tuple(prompt), prefix, sampling) for prompt, prefix in zip(json.loads(line), prefixes, strict=True)
        ]
        outputs: dict[str, list[int]] = {request.id: [] for request in requests}
        for request in requests:
            engine.add(request)
        while engine.busy:
            for output in engine.step():
                outputs[output.request_id] += [token.id for token in output.tokens]
        print(json.dumps(list(outputs.values())), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
