"""Run a Java program of pycocoevalcap's wheel: the Penn Treebank tokenizer, or METEOR 1.5.

Each program runs once over all texts, reads standard input to its end and stops by itself: there is no temporary file
and no dialogue that could deadlock, and nothing is written into the installed package. pycocoevalcap's own wrappers are
not used, but their commands are.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from prefixtune.evaluation.metrics.base import Unavailable, package_version, squeeze

# Far more than a slow machine needs for start-up and tables, and for each line.
_SECONDS, _SECONDS_PER_LINE = 600, 0.2


def jar_path(part: str, needed_by: str) -> Path:
    """A Java program in pycocoevalcap's wheel.

    Raises:
        Unavailable: pycocoevalcap is not installed, or lacks the program.
    """
    package_version("pycocoevalcap", needed_by)
    # Found through the installed files, not by import: the package has no `__init__`, so any folder of that name hides
    # it.
    path = Path(str(metadata.distribution("pycocoevalcap").locate_file(f"pycocoevalcap/{part}")))
    if not path.is_file():
        raise Unavailable(
            f"pycocoevalcap lacks {part}, and {needed_by} needs it", "pip install --force-reinstall pycocoevalcap"
        )
    return path


def run_java(command: Sequence[str], lines: Sequence[str]) -> list[str]:
    """Feed lines to a Java program, and return its output, one line for each.

    Raises:
        Unavailable: Java is missing, or the program failed.
    """
    java = shutil.which("java")
    if java is None:
        raise Unavailable(
            "METEOR and the Penn Treebank tokenizer are Java programs, and there is no `java`",
            "install one (Debian and Ubuntu: apt install default-jre-headless)",
        )
    # UTF-8 whatever the locale; an unpaired surrogate becomes a question mark.
    full_command = [java, "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", *command]
    encoded = "".join(line + "\n" for line in lines).encode("utf-8", "replace")
    try:
        result = subprocess.run(
            full_command,
            input=encoded,
            capture_output=True,
            timeout=_SECONDS + _SECONDS_PER_LINE * len(lines),
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise java_failure("java", str(error)) from error
    answers = result.stdout.decode("utf-8", "replace").split("\n")
    if answers and not answers[-1]:
        answers.pop()
    if result.returncode or len(answers) != len(lines):
        messages = result.stderr.decode("utf-8", "replace").strip().splitlines()
        raise java_failure(
            "java", f"exit code {result.returncode}, {len(answers)} lines for {len(lines)}: {' / '.join(messages[-3:])}"
        )
    return answers


def java_failure(program: str, reason: str) -> Unavailable:
    """The error that a program's failure raises."""
    return Unavailable(
        f"{program} failed ({reason})", "check that `java -version` works and that 2 GB of memory are free"
    )


# --- Penn Treebank words, as the evaluation of image captions counts them ---------------------------------------------

_TOKENIZER = "tokenizer/stanford-corenlp-3.4.1.jar"
# The words that the evaluation of captions drops. The tokenizer lower-cases brackets, so in fact they stay, there and
# here.
_PUNCTUATION = frozenset(["''", "'", "``", "`", *".?!,:;-", "--", "...", "-LRB-", "-RRB-", "-LCB-", "-RCB-"])


def treebank_words(texts: Sequence[str]) -> list[str]:
    """Each text as lower-case Penn Treebank words without punctuation, a space between.

    Raises:
        Unavailable: Java or pycocoevalcap is missing, or the program failed.
    """
    jar = jar_path(_TOKENIZER, "the Penn Treebank tokenizer")
    name = "edu.stanford.nlp.process.PTBTokenizer"
    lines = run_java(["-cp", str(jar), name, "-preserveLines", "-lowerCase"], [squeeze(text) for text in texts])
    # Only plain spaces separate words: the tokenizer keeps "2 1/2" together with a no-break space.
    return [" ".join(word for word in line.rstrip().split(" ") if word not in _PUNCTUATION) for line in lines]
