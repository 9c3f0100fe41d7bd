"""Joined memories in another engine and in torch: how many greedy answers to the test questions are the same.

    python -m research.memories.engines DATA RUN RESULTS.json [--gguf FILE] [--vllm-python PYTHON]

RUN is the folder of a run of `joined`. Texts are compared, and both with the right answers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.backbone.shapes import load_shapes
from prefixtune.engine.start import start_engine
from prefixtune.inference.generate import generate
from prefixtune.prefix.compose import concatenate
from research.memories.joined import documents


def main() -> None:
    """Answer all questions by both, and write what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "run", "results"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--gguf", default="", help="for llama.cpp: other weights than the embedded ones")
    parser.add_argument("--vllm-python", help="vLLM in place of llama.cpp, by the python of its environment")
    options = parser.parse_args()
    kind, more = "llama.cpp", {"gguf": options.gguf, "threads": 1}
    if options.vllm_python:
        kind, more = "vllm", {"python": options.vllm_python, "dtype": "float32", "max_length": 1024}
    found = list(documents(options.data))
    backbone = load_backbone("smollm2-135m", dtype="float32")
    memories = [load_prefix(options.run / "runs" / name / "prefix.safetensors", backbone) for name, *_ in found]
    asked = [row for *_, test in found for row in test]
    texts, right = [row["question"] for row in asked], [row["answer"] for row in asked]
    joined = concatenate(memories, backbone.rotation)
    how: dict[str, Any] = {"max_new_tokens": 8}
    ours = generate(backbone, texts, joined, **how)
    with start_engine(kind, load_shapes("smollm2-135m"), num_slots=4, **more) as engine:
        theirs = generate(backbone, texts, joined, engine=engine, **how)
        name = engine.name
    result = {
        "engine": name,
        "questions": len(texts),
        "same": sum(one == other for one, other in zip(ours, theirs, strict=True)),
        "exact": {
            "torch": sum(one.strip() == answer for one, answer in zip(ours, right, strict=True)),
            name: sum(one.strip() == answer for one, answer in zip(theirs, right, strict=True)),
        },
        "differ": [row for row in zip(texts, right, ours, theirs, strict=True) if row[2] != row[3]],
    }
    options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
