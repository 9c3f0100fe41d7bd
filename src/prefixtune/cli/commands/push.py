"""`prefixtune push`: upload a prefix to the Hugging Face hub."""

from __future__ import annotations

import argparse

from prefixtune.cli.common import AddCommand, add_json_and_quiet, print_json
from prefixtune.utils.console import Console

__all__ = ["register"]


def register(command: AddCommand) -> None:
    """Add the command and its options to the command line."""
    parser = command(
        "push",
        run,
        "upload a prefix to the Hugging Face hub, with a model card made from its header and scores",
        """

examples:
  prefixtune push runs/e2e/prefix.safetensors me/e2e-prefix --evaluation runs/e2e/evaluation
  prefixtune push runs/e2e/prefix.safetensors me/e2e-prefix --card""",
    )
    parser.add_argument("file", help="a .safetensors file of `prefixtune train`")
    parser.add_argument("repo", metavar="OWNER/NAME", help="repository; made where there is none")
    parser.add_argument("--evaluation", metavar="FOLDER", help="of `prefixtune evaluate`: its scores go into the card")
    parser.add_argument("--public", action="store_true", help="let everybody see a new repository")
    parser.add_argument("--message", default="", help="of the commit")
    parser.add_argument("--card", action="store_true", help="print the model card, and send nothing")
    parser.add_argument("--revision", help="branch, tag or commit (default: the main branch)")
    add_json_and_quiet(parser, "what was done")


def run(options: argparse.Namespace) -> int:
    """`prefixtune push`."""
    from prefixtune.backbone.prefixes import load_prefix
    from prefixtune.interop import hub

    if options.card:
        print(hub.make_card(load_prefix(options.file), options.repo, hub.read_evaluation(options.evaluation)), end="")
        return 0
    Console(quiet=options.quiet or options.json).info(f"uploading {options.file} to {options.repo} ...")
    url = hub.push(
        options.file,
        options.repo,
        evaluation=options.evaluation,
        private=not options.public,
        revision=options.revision,
        message=options.message,
    )
    if options.json:
        print_json({"repo": options.repo, "url": url})
    else:
        print(url)
    return 0
