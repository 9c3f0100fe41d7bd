"""`prefixtune doctor`: check that a backbone carries prefixes correctly."""

from __future__ import annotations

import argparse

from prefixtune.cli.common import AddCommand, add_json_and_quiet, print_json
from prefixtune.cli.loading import DEFAULT_BACKBONE, load
from prefixtune.utils.console import Console

__all__ = ["register"]

_SHOWN_WEIGHTS = 10
"""Most names of unused weights that `doctor` prints; `--json` prints all."""


def register(command: AddCommand) -> None:
    """Add the command and its options to the command line."""
    parser = command(
        "doctor",
        run,
        "check that a backbone carries prefixes correctly; exits 1 if anything fails",
        "Run it once for every backbone and version of transformers that you rely on.",
    )
    parser.add_argument("backbone", nargs="?", default=DEFAULT_BACKBONE, help="name, hub id, folder or .gguf file")
    parser.add_argument(
        "--dtype", default="float32", help="float32 (strictest, the default), bfloat16, float16 or auto"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    parser.add_argument("--quantize", default="", metavar="{int8,int4}", help="quantize the frozen weights (torchao)")
    add_json_and_quiet(parser, "every check")


def run(options: argparse.Namespace) -> int:
    """`prefixtune doctor`."""
    from prefixtune.doctor.examine import examine

    console = Console(quiet=options.quiet)
    backbone = load(console, options.backbone, options)
    checks = examine(
        backbone, on_check=lambda check: console.info(f"{'ok  ' if check.passed else 'FAIL'} {check.name}")
    )
    failed = [check for check in checks if not check.passed]
    unused = backbone.unused_weights
    if options.json:
        print_json(
            {
                "backbone": backbone.name,
                "passed": not failed,
                "unused_weights": list(unused),
                "checks": [{"name": c.name, "passed": c.passed, "detail": c.detail} for c in checks],
            }
        )
    else:
        rows = [["ok" if check.passed else "FAIL", check.name, check.detail] for check in checks]
        console.table(
            f"{backbone.name}: {len(checks) - len(failed)} of {len(checks)} checks passed",
            ["", "check", "detail"],
            rows,
            result=True,
        )
        if unused:
            shown = ", ".join(unused[:_SHOWN_WEIGHTS]) + (", ..." if len(unused) > _SHOWN_WEIGHTS else "")
            print(f"{len(unused)} weights of the checkpoint are not used: {shown}")
    return 1 if failed else 0
