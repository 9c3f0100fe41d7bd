"""`prefixtune pull`: download a prefix from the Hugging Face hub."""

from __future__ import annotations

import argparse

from prefixtune.cli.common import AddCommand, add_json_and_quiet, print_json
from prefixtune.utils.console import Console

__all__ = ["register"]


def register(command: AddCommand) -> None:
    """Add the command and its options to the command line."""
    parser = command(
        "pull",
        run,
        "download a prefix from the Hugging Face hub, and check it",
        """

example:
  prefixtune pull me/e2e-prefix e2e.safetensors""",
    )
    parser.add_argument("repo", metavar="OWNER/NAME", help="repository")
    parser.add_argument("output", metavar="OUT", help="a .safetensors file to write")
    parser.add_argument(
        "--file", default=None, metavar="NAME", help="file in the repository (default: prefix.safetensors)"
    )
    parser.add_argument("--revision", help="branch, tag or commit (default: the main branch)")
    add_json_and_quiet(parser, "what was done")


def run(options: argparse.Namespace) -> int:
    """`prefixtune pull`."""
    from prefixtune.interop import hub

    Console(quiet=options.quiet or options.json).info(f"downloading from {options.repo} ...")
    prefix = hub.pull(options.repo, options.output, revision=options.revision, name=options.file or hub.FILE)
    if options.json:
        print_json({"repo": options.repo, "path": options.output, "parameters": prefix.num_parameters})
    else:
        print(f"{options.output}: {prefix.num_parameters:,} parameters")
    return 0
