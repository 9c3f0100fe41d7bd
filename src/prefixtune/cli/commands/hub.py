"""`prefixtune push` and `prefixtune pull`: prefixes on the Hugging Face hub."""

from __future__ import annotations

import argparse

from prefixtune.cli.common import AddCommand, print_json
from prefixtune.utils.console import Console

__all__ = ["add_pull_arguments", "add_push_arguments", "pull", "push"]


def add_push_arguments(parser: argparse.ArgumentParser) -> None:
    """What `prefixtune push` takes."""
    parser.add_argument("file", help="a .safetensors file of `prefixtune train`")
    parser.add_argument("repo", metavar="OWNER/NAME", help="repository; made where there is none")
    parser.add_argument("--evaluation", metavar="FOLDER", help="of `prefixtune evaluate`: its scores go into the card")
    parser.add_argument("--public", action="store_true", help="let everybody see a new repository")
    parser.add_argument("--message", default="", help="of the commit")
    parser.add_argument("--card", action="store_true", help="print the model card, and send nothing")
    _shared(parser)


def add_pull_arguments(parser: argparse.ArgumentParser) -> None:
    """What `prefixtune pull` takes."""
    parser.add_argument("repo", metavar="OWNER/NAME", help="repository")
    parser.add_argument("output", metavar="OUT", help="a .safetensors file to write")
    parser.add_argument(
        "--file", default=None, metavar="NAME", help="file in the repository (default: prefix.safetensors)"
    )
    _shared(parser)


def _shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="branch, tag or commit (default: the main branch)")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON on stdout")
    parser.add_argument("--quiet", action="store_true", help="no progress, only results and errors")


def push(options: argparse.Namespace) -> int:
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


def pull(options: argparse.Namespace) -> int:
    """`prefixtune pull`."""
    from prefixtune.interop import hub

    Console(quiet=options.quiet or options.json).info(f"downloading from {options.repo} ...")
    prefix = hub.pull(options.repo, options.output, revision=options.revision, name=options.file or hub.FILE)
    if options.json:
        print_json({"repo": options.repo, "path": options.output, "parameters": prefix.num_parameters})
    else:
        print(f"{options.output}: {prefix.num_parameters:,} parameters")
    return 0


def register(command: AddCommand) -> None:
    """Add both commands and their options to the command line."""
    pushing = command(
        "push",
        push,
        "upload a prefix to the Hugging Face hub, with a model card made from its header and scores",
        """

examples:
  prefixtune push runs/e2e/prefix.safetensors me/e2e-prefix --evaluation runs/e2e/evaluation
  prefixtune push runs/e2e/prefix.safetensors me/e2e-prefix --card""",
    )
    add_push_arguments(pushing)
    pulling = command(
        "pull",
        pull,
        "download a prefix from the Hugging Face hub, and check it",
        """

example:
  prefixtune pull me/e2e-prefix e2e.safetensors""",
    )
    add_pull_arguments(pulling)
