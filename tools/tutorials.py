"""Follow tutorials as their readers do: run a page's blocks of shell and Python, in an empty folder with an empty home.

    python -m tools.tutorials docs/tutorials/*.md
    python -m tools.tutorials --short docs/tutorials/lora.md

prints each block and what it prints, and stops at the first that fails. Lines of comment above a block say more of it:

    <!-- not run -->         it needs something that the page names
    <!-- long -->            --short leaves it out, and what is said of its output
    <!-- short: A => B -->   --short writes B in place of A
    <!-- right -->           the block before this one must have printed each of its lines

The program is this checkout's; the backbone is fetched anew, unless `--home` names a home that has it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tools.pages import ROOT

BLOCK = re.compile(r"^((?:<!-- [^\n]* -->\n)*)```(bash|python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = {"bash": ["bash", "-e", "-c"], "python": ["python", "-c"]}


class WrongPageError(Exception):
    """A page's command failed, or did not print what the page shows."""


@dataclass(frozen=True)
class Block:
    """A block to run, or lines that the one before it must have printed."""

    language: str
    text: str


def read_blocks(page: str, *, short: bool = False) -> Iterator[Block]:
    r"""The blocks of a page, in order.

    >>> page = "```bash\nls\n```\n<!-- right -->\n```text\na\n```\n<!-- not run -->\n```bash\nssh host\n```\n"
    >>> [block.text for block in read_blocks(page)]
    ['ls\n', 'a\n']

    Args:
        page: Its text.
        short: In its short form.

    Raises:
        WrongPageError: What the short form replaces is not there.
    """
    left_out = False
    for found in BLOCK.finditer(page):
        marks, language, text = re.findall(r"<!-- (.*) -->", found[1]), found[2], found[3]
        if language != "text":
            left_out = "not run" in marks or (short and "long" in marks)
        for mark in marks:
            old, arrow, new = mark.removeprefix("short: ").partition(" => ")
            if short and arrow:
                if old not in text:
                    raise WrongPageError(f"{old!r} is not in the block {text!r}")
                text = text.replace(old, new)
        if language == "text" and "right" not in marks:
            continue
        if not left_out:
            yield Block(language, text)


def follow(page: Path, folder: Path, environment: Mapping[str, str], *, short: bool = False) -> int:
    """Run the blocks of one page, one after the other. What runs in the background is ended with the page.

    Args:
        page: Its file.
        folder: Where to run; empty.
        environment: Of its commands.
        short: In its short form.

    Returns:
        How many lines were printed as the page has them.

    Raises:
        WrongPageError: A block failed, or a line was not printed.
    """
    groups, output, right = [], "", 0
    try:
        for block in read_blocks(page.read_text(encoding="utf-8"), short=short):
            lines = [line.rstrip() for line in block.text.splitlines()]
            if block.language == "text":
                printed = {line.rstrip() for line in output.splitlines()}
                if missing := [line for line in lines if line not in printed]:
                    raise WrongPageError(f"{page.name} shows lines that were not printed:\n" + "\n".join(missing))
                right += len(lines)
                continue
            print(f"--- {block.text}", flush=True)
            started = time.monotonic()
            process = subprocess.Popen(
                [*COMMANDS[block.language], block.text],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            groups.append(process.pid)
            output, _ = process.communicate()
            print(f"{output}--- {time.monotonic() - started:.0f} s", flush=True)
            if process.returncode:
                raise WrongPageError(f"{page.name}: exit code {process.returncode} of:\n{block.text}{output[-2000:]}")
    finally:
        for group in groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGTERM)
    return right


def make_environment(home: Path, programs: Path, commands: Mapping[str, str]) -> dict[str, str]:
    """The environment of a reader whose programs are these, and the system's.

    Args:
        home: Their home folder.
        programs: An empty folder, for the programs.
        commands: The scripts of the shell to be found there, by name.
    """
    for name, script in commands.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (programs / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name.startswith(("OMP_", "LANG", "PIP_"))}
    path = f"{programs}:/usr/bin:/bin"
    return {**kept, "HOME": str(home.resolve()), "PATH": path, "REPOSITORY": str(ROOT)}


def main() -> int:
    """Run the pages of the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("pages", nargs="+", type=Path, help="pages of docs/tutorials")
    parser.add_argument("--home", type=Path, help="a folder to use as home (default: an empty one)")
    parser.add_argument("--short", action="store_true", help="in the short form of each page")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        home, programs = args.home or Path(temporary, "home"), Path(temporary, "bin")
        for path in (home, programs):
            path.mkdir(parents=True, exist_ok=True)
        run = f'exec env PYTHONPATH="{ROOT / "src"}" "{sys.executable}"'
        environment = make_environment(
            home, programs, {"prefixtune": f'{run} -m prefixtune "$@"', "python": f'{run} "$@"'}
        )
        for page in args.pages:
            folder = Path(tempfile.mkdtemp(dir=temporary))
            try:
                right = follow(page, folder, environment, short=args.short)
            except WrongPageError as error:
                print(f"error: {error}", file=sys.stderr)
                return 1
            print(f"=== {page.name}: {right} lines as the page has them", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
