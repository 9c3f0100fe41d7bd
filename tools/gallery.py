"""Train and score the skills and memories of examples/, keep the figures, and write docs/gallery.md.

    python -m tools.gallery                           # write the page again
    python -m tools.gallery --check                   # exit 1 if it is out of date
    python -m tools.gallery --measure [NAME ...]      # train and score these (default: all) first

Every figure of the page is in bench/results/gallery.json or in research/.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tools.pages import DOCS, ROOT, page_parser, write_or_check

PAGE = DOCS / "gallery.md"
RESULTS = ROOT / "bench" / "results" / "gallery.json"
SKILLS = sorted(path.stem for path in (ROOT / "examples" / "gallery").glob("*.jsonl") if "_test" not in path.stem)
QUICK = "prefixtune train --train examples/{}.jsonl --preset quick"
COMMANDS = {
    **{name: QUICK.format(f"gallery/{name}") for name in SKILLS},
    "bookings": QUICK.format("data/bookings") + " --source message --target booking",
    "chats": QUICK.format("data/chats"),
    "guide": "prefixtune distill --document examples/data/guide.txt --questions examples/data/guide.jsonl "
    "--prefix-length 32 --max-steps 24",
}
"""Name -> what trains it, but for `--output`."""
INTRODUCTION = """# Gallery

What a prefix of SmolLM2-135M learns from a few rows in a minute or two, and what it does not. Each row is scored on
questions that are not among its training rows. `make gallery` trains and scores all of them, and writes this page; no
figure is typed in."""
MADE = """## To make yourself

*Right* counts greedy answers that are right, letter for letter. *Named* counts those of the bare model that have
the right answer somewhere in them: where it is high, the rows taught a form. Seconds are those of one core, with
loading the model: two cores take about half of them. The files are in `examples/gallery` and `examples/data`, each
with its `_test.jsonl`."""
SCORED = """Score any of them with:

```bash
prefixtune evaluate --prefix runs/capitals/prefix.safetensors --data examples/gallery/capitals_test.jsonl \\
    --metrics exact_match
```"""
FROM_RESEARCH = """## From research

Tasks that the program makes itself (`--task toy_copy`), SmolLM2-135M in bfloat16, a start from solved examples
([how](../research/RESULTS.md#toy-tasks)). Two of them are hard for a prefix: sums in a new number base, and
a look-up."""
MEMORIES = """Four memories of documents of 285 tokens, trained to be joined
([joining](joining.md), `python -m research.memories.joined`): each alone, and all four in one request."""


def measure(name: str) -> dict[str, Any]:
    """Train and score one entry; the bare model is asked the same in its chat template.

    Args:
        name: A key of `COMMANDS`.

    Raises:
        RuntimeError: The command failed.
    """
    import prefixtune as pt
    from prefixtune.cli.main import main

    rows, tests = _rows(name, ""), _rows(name, "_test")
    asked = [messages for messages, _ in tests]
    with tempfile.TemporaryDirectory() as output:
        started = time.process_time()
        if code := main([*shlex.split(COMMANDS[name])[1:], "--output", f"{output}/run", "--quiet"]):
            raise RuntimeError(f"exit code {code} of {COMMANDS[name]}")
        seconds = time.process_time() - started
        backbone, path = pt.load_backbone("smollm2-135m", dtype="auto"), Path(output, "run", "prefix.safetensors")
        taught = pt.load(backbone, path)
        said = {
            "bare": pt.load(backbone).generate(asked, max_new_tokens=32),
            "prefix": taught.generate(asked, max_new_tokens=32),
        }
        wanted = [answer for _, answer in tests]
        assert taught.prefix is not None
        return {
            "rows": len(rows),
            "tests": len(tests),
            "positions": taught.prefix.prefix_length,
            "bytes": path.stat().st_size,
            "cpu_seconds": round(seconds),
            "named": sum(answer in text for text, answer in zip(said["bare"], wanted, strict=True)),
            **{who: sum(map(str.__eq__, map(str.strip, texts), wanted)) for who, texts in said.items()},
        }


def page(made: Mapping[str, Any]) -> str:
    """The page, in Markdown."""
    head = _head("skill", "rows", "positions", "bytes", "seconds", "named by bare", "right by bare", "right by prefix")
    rows = []
    for name, m in made["entries"].items():
        messages, answer = _rows(name, "_test")[0]
        example = f"{messages[-1]['content']} *{answer}*".replace("|", "\\|")
        of = f"of {m['tests']}"
        cells = [
            m["rows"],
            m["positions"],
            f"{m['bytes']:,}",
            m["cpu_seconds"],
            f"{m['named']} {of}",
            f"{m['bare']} {of}",
        ]
        rows.append(f"| {name}: {example} | {' | '.join(map(str, cells))} | **{m['prefix']} {of}** |")
    commands = "\n".join(f"{COMMANDS[name]} --output runs/{name}" for name in made["entries"])
    machine = f"Measured on: {made['machine']}, {made['date']}."
    if left := [name for name in COMMANDS if name not in made["entries"]]:
        machine += f" Not measured yet, though their rows are there: {', '.join(left)}."
    toys = "\n".join([_head("task", "rows", "positions", "steps", "seconds", "right"), *_toys()])
    parts = [INTRODUCTION, MADE, "\n".join([head, *rows]), machine, f"```bash\n{commands}\n```", SCORED]
    return "\n\n".join([*parts, FROM_RESEARCH, toys, MEMORIES, "\n".join(_memories())]) + "\n"


def _rows(name: str, part: str) -> list[tuple[list[dict[str, str]], str]]:
    """Each row's messages, and its last answer."""
    (path,) = (ROOT / word for word in shlex.split(COMMANDS[name]) if word.endswith(".jsonl"))
    found = []
    for line in path.with_name(f"{path.stem}{part}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "messages" not in row:
            asked, answer = row.values()
            row = {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        found.append((row["messages"][:-1], row["messages"][-1]["content"]))
    return found


def _toys() -> Iterator[str]:
    for path in sorted((ROOT / "research" / "results").glob("ceiling-toy-*.json")):
        cells = json.loads(path.read_text(encoding="utf-8"))
        cell = "cells/prefix-examples-all-P106-examples-subset0-seed0"
        facts, figures = cells[f"{cell}/cell.json"]["factors"], cells[f"{cell}/cell.json"]["figures"]
        score = cells[f"{cell}/evaluation.json"]["scores"]["exact_match"]["score"]
        name, length = path.stem.removeprefix("ceiling-").replace("-", "_"), facts["prefix_length"]
        seconds = round(figures["train_seconds"])
        yield f"| `{name}` | {figures['num_targets']} | {length} | {figures['steps']} | {seconds} | {score:.0f} % |"


def _memories() -> Iterator[str]:
    folder = ROOT / "research" / "memories" / "results"
    seeds = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("default_seed*.json"))]
    options, exact = seeds[0]["options"], {}
    for name in ("alone", "joined_4"):
        exact[name] = f"{statistics.fmean(one[name]['exact'] for one in seeds):.0%}"
    yield _head("positions of each", "steps", "seeds", "alone", "four joined")
    yield f"| {options['length']} | {options['steps']} | {len(seeds)} | {exact['alone']} | {exact['joined_4']} |"


def _figures() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"entries": {}}


def _head(*columns: str) -> str:
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def main() -> int:
    """Measure, write or check; returns the exit code."""
    parser = page_parser(__doc__)
    parser.add_argument("--measure", nargs="*", metavar="NAME", choices=COMMANDS, help="train and score these")
    args = parser.parse_args()
    if args.measure is not None:
        from datetime import date

        import prefixtune as pt
        import prefixtune.training.train
        from prefixtune.utils.machine import describe_machine

        # What is done once, imports and the check of the model, is not counted.
        pt.load_backbone("smollm2-135m")
        facts = describe_machine()
        about = {"machine": f"{facts['processor']}, {facts['cores']} cores", "date": date.today().isoformat()}
        for name in args.measure or COMMANDS:
            measured = measure(name)
            entries = {**_figures()["entries"], name: measured}
            print(name, entries[name], flush=True)
            entries = {name: entries[name] for name in COMMANDS if name in entries}
            RESULTS.write_text(json.dumps({**about, "entries": entries}, indent=1) + "\n", encoding="utf-8")
    return write_or_check(PAGE, page(_figures()), check=args.check)


if __name__ == "__main__":
    sys.exit(main())
