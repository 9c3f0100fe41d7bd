"""Write docs/models.md: which model types carry prefixes, found by examining a tiny random model of each.

python docs/support.py                 examine all of them, a few minutes, and write the page
python docs/support.py gpt2 t5 bert    examine these only, and print their table
python docs/support.py --json ...      print every check as JSON instead; writes nothing
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from prefixtune.backbone import Backbone
    from prefixtune.doctor import Check

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "models.md"
COMMAND = "python docs/support.py"

sys.path.insert(0, str(DOCS.parent / "tests"))

Verdict = Literal["works", "works, but", "refused", "fails", "absent"]

KINDS = {
    "decoder": "Decoder-only models",
    "hybrid": "Hybrids and state-space models",
    "encoder-decoder": "Encoder-decoders",
    "encoder": "Encoders",
}
"""The zoo's kinds, and the headings they stand under."""

HARMLESS = "dropout stays off in training mode"
"""A check that routers of experts fail which draw at random in training mode: frozen models are never put into it."""

INTRODUCTION = """# Models

Which types of model carry a prefix. Each row is a tiny model of that type with random weights, put through the checks
of `prefixtune doctor`: the prefix reaches every attention layer and takes a gradient there; padding, batching and
caching change no number; generation uses the prefix; the model stays bit for bit as it was.

| verdict | meaning |
|---|---|
| works | every check passes |
| works, but | every check passes; the note says what is missing or goes another way |
| refused | a prefix would not reach its attention rightly: loading stops with the message in the note |
| fails | a check fails, or loading stops with an unexpected error: do not use it |
| absent | the installed transformers has no such type |

A site is where a prefix stands: in front of the decoder's self-attention, of the encoder's, or of the decoder's
attention to the encoder (cross). Rows that are padded instead of packed, and prefixes that every decoding step puts in
front instead of finding them in the cache, cost time and change no number. A type says how a model attends, not how
well it learns. A model of your own is examined with `prefixtune doctor your/model`, which uses its real weights."""


@dataclass(frozen=True)
class Result:
    """What came of one model.

    Attributes:
        name: Its name in the zoo.
        model_type: As transformers calls it.
        kind: The zoo's kind.
        family: Well-known models of the type.
        sites: Where a prefix can stand; empty for a model that was refused.
        verdict: `works`; `works, but` with a restriction that `note` tells; `refused` when it is loaded; `fails` a
            check, or with an unexpected error; `absent` from the installed transformers.
        note: The restriction, the reason, or what failed; empty where there is nothing to say.
        checks: Every check that was made.
    """

    name: str
    model_type: str
    kind: str
    family: str
    sites: tuple[str, ...]
    verdict: Verdict
    note: str
    checks: tuple[Check, ...] = ()


def examine_all(names: Sequence[str] = (), *, on_result: Callable[[Result], None] | None = None) -> list[Result]:
    """Examine the zoo's models, or some of them, as `prefixtune doctor` would.

    Args:
        names: The zoo's names; none: all.
        on_result: Told of every result as soon as it is there.
    """
    from zoo import ZOO, make_tokenizer

    tokenizer = make_tokenizer()
    results = []
    for name in names or ZOO:
        results.append(examine_one(name, tokenizer))
        if on_result is not None:
            on_result(results[-1])
    return results


def examine_one(name: str, tokenizer: object) -> Result:
    """Make a tiny model, load it as a backbone, and run the doctor's checks on it."""
    from prefixtune.backbone import Backbone
    from prefixtune.doctor import examine
    from prefixtune.errors import PrefixError
    from zoo import ZOO, exists, make_model

    entry = ZOO[name]

    def result(verdict: Verdict, note: str = "", sites: tuple[str, ...] = (), checks: tuple[Check, ...] = ()) -> Result:
        return Result(name, entry.model_type, entry.kind, entry.family, sites, verdict, note, checks)

    if not exists(name):
        return result("absent", "not in the installed transformers")
    model = make_model(name, tokenizer)
    try:
        backbone = Backbone.from_model(model, tokenizer, f"tiny-{name}")
    except PrefixError as error:
        return result("refused", error.message)
    except Exception as error:
        return result("fails", f"loading: {_one_line(error)}")
    sites = tuple(backbone.layout.geometry)
    try:
        checks = tuple(examine(backbone))
    except Exception as error:
        return result("fails", f"examining: {_one_line(error)}", sites)
    failed = [check for check in checks if not check.passed and check.name != HARMLESS]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        return result("fails", f"{failed[0].name}: {failed[0].detail}{more}", sites, checks)
    notes = restrictions(backbone)
    if not all(check.passed for check in checks):
        notes.append("`.train()`, which nothing here calls, changes its numbers")
    return result("works, but" if notes else "works", "; ".join(notes), sites, checks)


def restrictions(backbone: Backbone) -> list[str]:
    """What a backbone lacks, or does another way than most of its kind."""
    layout = backbone.layout
    notes = list(layout.notes)
    if not layout.packable and layout.kind != "encoder":
        notes.append("rows are padded, not packed")
    if layout.cache_layers is None and layout.kind == "decoder":
        notes.append("generation injects the prefix")
    if not layout.carries:
        notes.append("no gradient checkpointing")
    return notes


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# --- the page --------------------------------------------------------------------------------------------------------


def models_page(results: Sequence[Result]) -> str:
    """The page, in Markdown."""
    import torch
    import transformers

    working = sum(result.verdict in ("works", "works, but") for result in results)
    versions = f"transformers {transformers.__version__} and torch {torch.__version__}"
    parts = [INTRODUCTION, "", f"{working} of {len(results)} work, with {versions}. Written by `{COMMAND}`."]
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
    """Examine, and write or print; exits 1 if a model fails."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Examine tiny models of many types.", allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="TYPE", help="names in tests/zoo.py (default: all)")
    parser.add_argument("--json", action="store_true", help="print every check as JSON; writes no page")
    options = parser.parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from zoo import ZOO

    unknown = [name for name in options.names if name not in ZOO]
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}; choose from {', '.join(ZOO)}")

    def show(result: Result) -> None:
        print(f"{result.name:22}{result.verdict:12}{result.note[:140]}", file=sys.stderr, flush=True)

    results = examine_all(options.names, on_result=show)
    if options.json:
        print(json.dumps(report(results), indent=1, ensure_ascii=False))
    elif options.names:
        print("\n".join(table(results)))
    else:
        PAGE.write_text(models_page(results), encoding="utf-8")
        print(f"wrote {PAGE}", file=sys.stderr)
    return int(any(result.verdict == "fails" for result in results))


def report(results: Sequence[Result]) -> dict[str, object]:
    """Every result with its checks, and the versions they hold for; to be written as JSON."""
    import torch
    import transformers

    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    return {"command": COMMAND, **versions, "models": [asdict(result) for result in results]}


if __name__ == "__main__":
    sys.exit(main())
