"""Write docs/models.md: the model types that carry prefixes (`make models-page`).

    python -m tools.models_page                 # examine all types, about ten minutes, and write the page
    python -m tools.models_page gpt2 t5 bert    # examine these only, and print their table

Exits 1 if a model gives wrong results or a traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence

# Before huggingface_hub is imported, which reads it then; processes that examine models inherit it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers

from tools.models_sweep import FAULTS, Result, examine_all, names_of_all
from tools.pages import DOCS

PAGE = DOCS / "models.md"
COMMAND = "make models-page"

KINDS = {
    "decoder": "Decoder-only models",
    "hybrid": "Hybrids and state-space models",
    "encoder-decoder": "Encoder-decoders",
    "encoder": "Encoders",
}
"""The zoo's kinds, and their headings."""

INTRODUCTION = """# Models

Which types of model carry a prefix. Each row is a tiny model of that type with random weights. It generates, and
is examined with the four comparisons of `prefixtune doctor`: a gradient reaches every layer's prefix; padded = alone;
packed = alone; cached = recomputed.

| verdict | meaning |
|---|---|
| works | every comparison passes |
| works, but | every comparison passes; the note says what is missing or done in another way |
| refused | a prefix would not reach its attention correctly: loading stops with the message in the note |
| wrong, traceback | a comparison fails, or an unexpected error stops it: a fault of this project |
| not built | no tiny model of it could be made; the self-check decides when one is loaded |
| absent | the installed transformers has no such type |

A site is an attention with a prefix: the decoder's self-attention, the encoder's, or the decoder's attention to the
encoder (cross). Rows that are padded instead of packed cost time and change no number. A type says how a model attends,
not how well it learns. Examine a model of your own with `prefixtune doctor your/model`, which uses its real weights.

LongRoPE (Phi-3, Phi-3.5 and Phi-4-mini with 128k) turns all keys of a text otherwise as soon as the text is longer
than the model's original length, 4,096 positions. A prefix is used with texts up to that length, its own positions
included, and this is also the limit of the engine and of `prefixtune serve`, with and without a prefix. The bare
model takes longer texts in `generate`; elsewhere texts on both sides of the limit are refused.

The same four comparisons are made when a type of model is first loaded, on a few tokens and in float32. Some models
are compared in their own dtype, with a wider tolerance: those of more than two billion parameters in half precision,
quantized ones, and those that are spread over devices. A pass is stored in the cache folder (`$PREFIXTUNE_HOME`) for
this type, configuration, device, attention kernel and these versions; a model that fails is refused with the
differences. `PREFIXTUNE_SELF_CHECK=0` turns the check off; `prefixtune doctor` shows the differences and their
tolerances."""


def models_page(results: Sequence[Result]) -> str:
    """The page, in Markdown."""
    working = sum(result.verdict in ("works", "works, but") for result in results)
    versions = f"transformers {transformers.__version__} and torch {torch.__version__}"
    counts = ", ".join(f"{sum(r.verdict == v for r in results)} {v}" for v in ("refused", "not built", *FAULTS))
    summary = f"{working} of {len(results)} work ({counts}), with {versions}. Written by `{COMMAND}`."
    parts = [INTRODUCTION, "", summary]
    for kind, heading in KINDS.items():
        rows = [result for result in results if result.kind == kind]
        if rows:
            parts += ["", f"## {heading}", "", *table(rows)]
    return "\n".join([*parts, ""])


def table(results: Sequence[Result]) -> list[str]:
    """The rows of a table, its heading first."""
    lines = ["| model type | such as | sites | verdict | note |", "|---|---|---|---|---|"]
    for result in results:
        variant = result.name.removeprefix(result.model_type).lstrip("-")
        shown = f"`{result.model_type}`" + (f" ({variant})" if variant else "")
        cells = (shown, result.family, ", ".join(result.sites) or "-", result.verdict, result.note)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Examine, and write or print; exits 1 if a model gives wrong results or a traceback."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Examine tiny models of many types.", allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="TYPE", help="model types, or names in tests/zoo.py (default: all)")
    options = parser.parse_args(arguments)
    known = names_of_all()
    unknown = [name for name in options.names if name not in known]
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}; choose from {', '.join(known)}")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        # An empty cache folder: results of earlier self-checks do not count.
        os.environ["PREFIXTUNE_HOME"] = folder
        for result in examine_all(options.names):
            print(f"{result.name:26}{result.verdict:12}{result.note[:140]}", file=sys.stderr, flush=True)
            results.append(result)
    if options.names:
        print("\n".join(table(results)))
    else:
        PAGE.write_text(models_page(results), encoding="utf-8")
        print(f"wrote {PAGE}", file=sys.stderr)
    for verdict in FAULTS:
        print(f"{verdict}: {', '.join(r.name for r in results if r.verdict == verdict) or 'none'}", file=sys.stderr)
    return int(any(result.verdict in FAULTS for result in results))


if __name__ == "__main__":
    sys.exit(main())
