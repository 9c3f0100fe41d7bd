"""Write docs/gpu.md from bench/results/gpu.json, which `make gpu` writes.

python -m tools.gpu_page            # write it
python -m tools.gpu_page --check    # exit 1 if it is out of date
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from prefixtune.utils.console import format_figure
from tools.pages import DOCS, ROOT, page_parser, write_or_check

PAGE = DOCS / "gpu.md"
RESULTS = ROOT / "bench" / "results" / "gpu.json"
PARTS = {
    "load": ("Loading", "From files to a model on the device, in bfloat16; peaks of host memory are above the start."),
    "train": (
        "A training step",
        "Random tokens, bfloat16; PEFT's prefix tuning has the same encoder, and each library its own process.",
    ),
    "decode": ("Decoding", "64 tokens in, 64 out, P = 10, a prefix for each text, from requests to the last token."),
    "prompt": ("One long prompt", "A prefix of 10 and one prompt as long as the model takes, 32k at most."),
}
INTRODUCTION = """# On a GPU

`make gpu` runs the tests marked `gpu` and measures what only a GPU tells: loading, a training step against PEFT,
decoding, and the memory of one long prompt. `make gpu GPU_ARGS="--vllm-python PYTHON"` names an environment with vLLM,
which then decodes too. It measures SmolLM2-135M, and models of the shapes of Llama 3.2 1B and Llama 3.1 8B with random
weights, which say something of speed and memory alone. It writes `bench/results/gpu.json` and this page.
`python -m bench.gpu --device cpu --tiny` runs the same program on a CPU in a minute, to see that it works."""
UNMEASURED = "**Not measured.** Nothing of this was run on a GPU yet."


def page(results: Mapping[str, Any] | None) -> str:
    """The page, in Markdown; without results of a GPU, in full size, it says so."""
    if results is None or results["quick"] or not results["device"].startswith("cuda"):
        return f"{INTRODUCTION}\n\n{UNMEASURED}\n"
    machine, versions = results["machine"], results["versions"]
    device = (
        f"{machine.get('gpu', machine['processor'])}, {machine.get('gpu_memory_gib', machine.get('memory_gib'))} GiB"
    )
    facts = f"{device}; torch {versions['torch']}, transformers {versions['transformers']}; {results['date'][:10]}"
    parts = [INTRODUCTION, f"Measured on: {facts}. A figure is the median of {results['repeats']} rounds."]
    for part, (title, words) in PARTS.items():
        rows = [
            f"| {row['what']} | {_value(row)} |".replace("\n", " ") for row in results["summary"] if row["part"] == part
        ]
        parts += [f"## {title}", words, "\n".join(["| what | |", "|---|---|", *rows])]
    return "\n\n".join(parts) + "\n"


def _value(row: Mapping[str, Any]) -> str:
    if row["value"] is None:
        return f"not measured: {row['not_measured']}"
    return f"{format_figure(row['value'])} {row['unit']}".strip()


if __name__ == "__main__":
    options = page_parser(__doc__).parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else None
    sys.exit(write_or_check(PAGE, page(results), check=options.check))
