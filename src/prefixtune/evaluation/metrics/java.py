"""The two Java programs in pycocoevalcap's wheel: the Penn Treebank tokenizer, and METEOR 1.5.

Each is run once over all texts, reads standard input to its end and stops by itself: no temporary file, no dialogue
that could lock up, and nothing is written into the installed package. Texts are put on one line first, as either takes
a line for an item and Java knows more line ends than one. pycocoevalcap's own wrappers are not used, but their commands
are.

Knows nothing of references, hypotheses and scores.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from prefixtune.evaluation.metrics.base import Unavailable
from prefixtune.evaluation.metrics.protocols import squeeze

__all__ = ["meteor_statistics", "package_version", "treebank_words"]


_TOKENIZER = "tokenizer/stanford-corenlp-3.4.1.jar"
_METEOR = "meteor/meteor-1.5.jar"
# What captioning's evaluation drops; written small by the tokenizer, brackets in fact stay, there as here.
_PUNCTUATION = frozenset(["''", "'", "``", "`", *".?!,:;-", "--", "...", "-LRB-", "-RRB-", "-LCB-", "-RCB-"])
_COLUMNS = 23
# Far beyond what is needed on a slow machine: start-up and tables, and the work of each line.
_SECONDS, _SECONDS_PER_LINE = 600, 0.2


def package_version(name: str, needed_by: str) -> str:
    """The version of an installed package of the extra `scores`.

    Raises:
        Unavailable: It is not installed.
    """
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError as error:
        raise Unavailable(
            f"{name} is not installed, and {needed_by} needs it", "pip install 'prefixtune[scores]'"
        ) from error


def treebank_words(texts: Sequence[str]) -> list[str]:
    """Each text as lower-case Penn Treebank words without punctuation, a space between.

    Raises:
        Unavailable: Java or pycocoevalcap is missing, or the program failed.
    """
    jar = _jar(_TOKENIZER, "the Penn Treebank tokenizer")
    name = "edu.stanford.nlp.process.PTBTokenizer"
    lines = _run(["-cp", str(jar), name, "-preserveLines", "-lowerCase"], [squeeze(text) for text in texts])
    # Spaces alone part words: the tokenizer keeps "2 1/2" together by a no-break space.
    return [" ".join(word for word in line.rstrip().split(" ") if word not in _PUNCTUATION) for line in lines]


def meteor_statistics(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> list[list[float]]:
    """METEOR's 23 counts for each item, against the best of its references.

    They are the lengths of hypothesis and reference, of their function words, for each of the four matchers (exact,
    stem, synonym, paraphrase) the matched content words of both and the matched function words of both, the chunks, and
    all matched words of both.

    Raises:
        Unavailable: Java or pycocoevalcap is missing, or the program failed.
    """
    jar = _jar(_METEOR, "METEOR")
    # `|||` stands between texts, so it cannot stand in one.
    lines = [
        " ||| ".join(["SCORE", *(squeeze(text.replace("|||", " ")) for text in [*item, hypothesis])])
        for hypothesis, item in zip(hypotheses, references, strict=True)
    ]
    command = ["-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    return [_numbers(line) for line in _run(command, lines)]


def _numbers(line: str) -> list[float]:
    try:
        numbers = [float(word) for word in line.split()]
    except ValueError:
        numbers = []
    if len(numbers) != _COLUMNS:
        raise _failed("METEOR", f"it answered {line[:200]!r}")
    return numbers


def _jar(part: str, what: str) -> Path:
    package_version("pycocoevalcap", what)
    # By the installed files and not by import: the package has no `__init__`, so any folder of that name hides it.
    path = Path(str(metadata.distribution("pycocoevalcap").locate_file(f"pycocoevalcap/{part}")))
    if not path.is_file():
        raise Unavailable(
            f"pycocoevalcap lacks {part}, and {what} needs it", "pip install --force-reinstall pycocoevalcap"
        )
    return path


def _run(command: Sequence[str], lines: Sequence[str]) -> list[str]:
    """Feed lines to a Java program, and take as many from it."""
    java = shutil.which("java")
    if java is None:
        raise Unavailable(
            "METEOR and the Penn Treebank tokenizer are Java programs, and there is no `java`",
            "install one (Debian and Ubuntu: apt install default-jre-headless)",
        )
    # UTF-8 whatever the locale; a surrogate without its other half is no text and becomes a question mark.
    full = [java, "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", *command]
    given = "".join(line + "\n" for line in lines).encode("utf-8", "replace")
    try:
        done = subprocess.run(
            full, input=given, capture_output=True, timeout=_SECONDS + _SECONDS_PER_LINE * len(lines), check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _failed("java", str(error)) from error
    answers = done.stdout.decode("utf-8", "replace").split("\n")
    if answers and not answers[-1]:
        answers.pop()
    if done.returncode or len(answers) != len(lines):
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise _failed(
            "java", f"exit code {done.returncode}, {len(answers)} lines for {len(lines)}: {' / '.join(said[-3:])}"
        )
    return answers


def _failed(what: str, how: str) -> Unavailable:
    return Unavailable(f"{what} failed ({how})", "check that `java -version` works and that 2 GB of memory are free")
