"""Run a Java program of pycocoevalcap's wheel: the Penn Treebank tokenizer, or METEOR 1.5.

Each program runs once over all texts, reads standard input to its end and stops by itself. So there is no temporary
file and no dialogue that could deadlock, and nothing is written into the installed package. pycocoevalcap's own
wrappers are not used, but their commands are.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

# Far more than a slow machine needs for start-up and tables, and for each line.
_SECONDS, _SECONDS_PER_LINE = 600, 0.2
_TOKENIZER = "tokenizer/stanford-corenlp-3.4.1.jar"
# The words that the evaluation of captions drops. The tokenizer lower-cases brackets, so in fact they stay, there and
# here.
_PUNCTUATION = frozenset(["''", "'", "``", "`", *".?!,:;-", "--", "...", "-LRB-", "-RRB-", "-LCB-", "-RCB-"])


class Unavailable(ValueError):
    """A metric cannot be computed: a program or a library is missing here, or it cannot read such texts.

    Args:
        reason: What is missing or why, as a sentence without its full stop.
        remedy: How to get it, or what to do instead.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason
        self.remedy = remedy


def squeeze(text: str) -> str:
    r"""A text on one line: every run of white space, line and paragraph separators among it, becomes one space.

    >>> squeeze(" a\tb\u2028c\n")
    'a b c'
    """
    return " ".join(text.split())


def package_version(name: str) -> str:
    """The version of an installed package of the extra `scores`.

    Raises:
        Unavailable: It is not installed.
    """
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError as error:
        raise Unavailable(f"{name} is not installed", "pip install 'prefixtune[scores]'") from error


def jar_path(part: str) -> Path:
    """A Java program in pycocoevalcap's wheel.

    Raises:
        Unavailable: pycocoevalcap is not installed.
    """
    package_version("pycocoevalcap")
    # Found through the installed files, not by import: the package has no `__init__`, so any folder of that name hides
    # it.
    return Path(str(metadata.distribution("pycocoevalcap").locate_file(f"pycocoevalcap/{part}")))


def run_java(command: Sequence[str], lines: Sequence[str]) -> list[str]:
    """Feed lines to a Java program, and return its output, one line for each.

    Raises:
        Unavailable: Java is missing, or the program failed.
    """
    java = shutil.which("java")
    if java is None:
        what = "METEOR and the Penn Treebank tokenizer are Java programs, and there is no `java`"
        raise Unavailable(what, "install one (Debian and Ubuntu: apt install default-jre-headless)")
    # UTF-8 whatever the locale; an unpaired surrogate becomes a question mark. Collecting garbage in one thread takes a
    # fifth less of the processors' time.
    full_command = [java, "-XX:+UseSerialGC", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", *command]
    encoded = "".join(line + "\n" for line in lines).encode("utf-8", "replace")
    seconds = _SECONDS + _SECONDS_PER_LINE * len(lines)
    try:
        result = subprocess.run(full_command, input=encoded, capture_output=True, timeout=seconds, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise java_failure(str(error)) from error
    answers = result.stdout.decode("utf-8", "replace").removesuffix("\n").split("\n")
    if result.returncode or len(answers) != len(lines):
        messages = result.stderr.decode("utf-8", "replace").strip().splitlines()
        what = f"exit code {result.returncode}, {len(answers)} lines for {len(lines)}: {' / '.join(messages[-3:])}"
        raise java_failure(what)
    return answers


def java_failure(reason: str) -> Unavailable:
    """The error that a program's failure raises."""
    return Unavailable(f"java failed ({reason})", "check that `java -version` works and that 2 GB of memory are free")


def treebank_words(texts: Sequence[str]) -> list[str]:
    """Each text as lower-case Penn Treebank words without punctuation, a space between: as captions are evaluated.

    Raises:
        Unavailable: Java or pycocoevalcap is missing, or the program failed.
    """
    name = "edu.stanford.nlp.process.PTBTokenizer"
    command = ["-cp", str(jar_path(_TOKENIZER)), name, "-preserveLines", "-lowerCase"]
    lines = run_java(command, [squeeze(text) for text in texts])
    # Only plain spaces separate words: the tokenizer keeps "2 1/2" together with a no-break space.
    return [" ".join(word for word in line.rstrip().split(" ") if word not in _PUNCTUATION) for line in lines]
