"""`prefixtune generate`: continue texts with prefixes, or tell their labels."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixtune.cli.common import (
    AddCommand,
    add_decoding_arguments,
    add_json_and_quiet,
    find_artifact,
    generate_config,
    load_artifact,
    load_with_prefixes,
    print_json,
)
from prefixtune.errors import ConfigError, RequestError
from prefixtune.utils.console import Console

if TYPE_CHECKING:
    from prefixtune.backbone.backbone import Backbone
    from prefixtune.inference.config import GenerateConfig
    from prefixtune.prefix.prefix import Prefix
    from prefixtune.prefix.text_format import TextFormat

__all__ = ["run", "unescape"]


_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{4}|.|$)", re.DOTALL)
_PLAIN = {r"\n": "\n", r"\r": "\r", r"\t": "\t", r"\\": "\\"}


def run(options: argparse.Namespace) -> int:
    """`prefixtune generate`."""
    from prefixtune.backbone.prefixes import load_prefix
    from prefixtune.prefix.hub import prefix_file

    console = Console(quiet=options.quiet or options.json)
    lines = options.texts or _stdin_lines(console)
    _check_texts(lines)
    if options.escapes:
        lines = [unescape(line, number) for number, line in enumerate(lines, start=1)]
    if options.stream and (len(lines) != 1 or options.json):
        raise ConfigError(
            f"--stream shows one text as it comes, but got {len(lines)}.", hint="give one text, without --json."
        )
    if len(options.prefix) > 1 and len(options.prefix) != len(lines):
        raise RequestError(
            f"{len(options.prefix)} prefixes for {len(lines)} texts.", hint="give --prefix once, or once per text."
        )
    # A blank line of stdin has an empty result, so that results stand beside their sources.
    kept = [number for number, line in enumerate(lines) if options.texts or line.strip()]
    texts = [lines[number] for number in kept]
    names = [options.prefix[number] for number in kept] if len(options.prefix) > 1 else list(options.prefix)
    files = [str(prefix_file(name)) for name in names]
    weights: Path | None = None
    header: Mapping[str, Any] = {}
    if options.run_folder:
        file, weights, header = find_artifact(options, None)
        names = files = [file] if file else []
    # All that can be wrong is reported before the model loads.
    read = [load_prefix(file) for file in files]
    config = generate_config(options, read, header.get("task"))
    labelling = _is_labelling(read, options)
    if options.stream and not labelling:
        from prefixtune.inference.streaming import check_streams

        check_streams(config)
    form: TextFormat | None = None
    loaded: list[Prefix] = []
    if weights is not None:
        backbone, _, form = load_artifact(console, options, None, weights)
    else:
        backbone, loaded = load_with_prefixes(console, options, files)
    if labelling:
        rows = _tell_labels(console, backbone, loaded, texts, config)
    elif options.stream:
        return _stream(console, backbone, texts[0], loaded, form, config)
    else:
        rows = _continue(console, backbone, texts, loaded, form, config)
    for number, row in enumerate(rows):
        row["prefix"] = None if not names else names[0] if len(names) == 1 else names[number]
    _print_rows(options, lines, dict(zip(kept, rows, strict=True)))
    return 0


def _check_texts(lines: Sequence[str]) -> None:
    """Refuse arguments whose bytes are no UTF-8, which the system hands over as half characters."""
    for number, line in enumerate(lines, start=1):
        try:
            line.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ConfigError(f"text {number} is no UTF-8 text: {line[:40]!r}.", hint="convert it to UTF-8.") from error


def _is_labelling(prefixes: Sequence[Prefix], options: argparse.Namespace) -> bool:
    """Whether the prefixes classify or tag, and do not write."""
    from prefixtune.data.labels import labels_of

    kinds = [labels.kind if (labels := labels_of(prefix)) else "generation" for prefix in prefixes]
    if set(kinds) <= {"generation"}:
        return False
    if len(set(kinds)) > 1 or options.stream:
        raise ConfigError(
            f"the prefixes are for {', '.join(sorted(set(kinds)))}{', and --stream was asked for' * options.stream}.",
            hint="give prefixes of one kind at a time, and labels without --stream.",
        )
    return True


def _stream(
    console: Console,
    backbone: Backbone,
    text: str,
    loaded: Sequence[Prefix],
    form: TextFormat | None,
    config: GenerateConfig,
) -> int:
    """Print one text's output as it comes."""
    from prefixtune.inference.streaming import stream

    cut: set[int] = set()
    prefix = loaded[0] if loaded else None
    for piece in stream(backbone, text, prefix, text_format=form, config=config, on_cut=cut.update):
        print(piece, end="", flush=True)
    print()
    _report_cut(console, cut, 1)
    return 0


def _continue(
    console: Console,
    backbone: Backbone,
    texts: Sequence[str],
    loaded: Sequence[Prefix],
    form: TextFormat | None,
    config: GenerateConfig,
) -> list[dict[str, Any]]:
    """Each text's output."""
    from prefixtune.inference.generate import generate

    cut: set[int] = set()
    prefixes: Any = None if not loaded else loaded[0] if len(loaded) == 1 else loaded
    with console.progress("generating", len(texts)) as bar:
        outputs = generate(
            backbone,
            texts,
            prefixes,
            text_format=form,
            config=config,
            on_batch=bar.update,
            on_cut=cut.update,
        )
    _report_cut(console, cut, len(texts))
    return [
        {"text": text, "output": output, "cut": number in cut}
        for number, (text, output) in enumerate(zip(texts, outputs, strict=True))
    ]


def _print_rows(options: argparse.Namespace, lines: Sequence[str], rows: Mapping[int, Mapping[str, Any]]) -> None:
    """One result per line of input, in order; `rows` are by the number of their line."""
    for number, line in enumerate(lines):
        row = rows.get(number, {"text": line, "output": "", "note": "the line is blank"})
        if options.json:
            print_json(row)
        else:
            # One line a result, whatever reads it.
            print(str(row["output"]).replace("\n", "\\n").replace("\r", "\\r"))


def _tell_labels(
    console: Console,
    backbone: Backbone,
    loaded: Sequence[Prefix],
    texts: Sequence[str],
    config: GenerateConfig,
) -> list[dict[str, Any]]:
    """What prefixes that classify or tag tell of each text: labels, and their probabilities."""
    from prefixtune.data.labels import labels_of
    from prefixtune.inference.classify import classify, tag
    from prefixtune.inference.config import check_tagging_lengths

    labels = labels_of(loaded[0])
    tagging = labels is not None and labels.kind == "tagging"
    if tagging:
        check_tagging_lengths(config)
    each = list(loaded) * len(texts) if len(loaded) == 1 else list(loaded)
    groups: dict[int, list[int]] = {}
    for number, prefix in enumerate(each):
        groups.setdefault(id(prefix), []).append(number)
    results: dict[int, Any] = {}
    cut: set[int] = set()
    with console.progress("labelling", len(texts)) as bar:
        for numbers in groups.values():
            prefix, chosen = each[numbers[0]], [texts[number] for number in numbers]
            if tagging:
                found: Sequence[Any] = tag(
                    backbone, [text.split() for text in chosen], prefix, batch_size=config.batch_size
                )
            else:
                found = classify(
                    backbone,
                    chosen,
                    prefix,
                    batch_size=config.batch_size,
                    max_total_length=config.max_total_length,
                    on_too_long=config.on_too_long,
                    on_cut=partial(_keep_cut, cut, numbers),
                )
            results.update(zip(numbers, found, strict=True))
            bar.update(len(results))
    rows: list[dict[str, Any]] = []
    for number, text in enumerate(texts):
        result = results[number]
        if tagging:
            output = " ".join(token.label for token in result)
            detail: dict[str, Any] = {"tokens": text.split(), "tags": [token.label for token in result]}
            detail["probabilities"] = [_rounded(token.probabilities) for token in result]
        else:
            output, detail = result.label, {"label": result.label, "probabilities": _rounded(result.probabilities)}
            detail["cut"] = number in cut
        rows.append({"text": text, "output": output, **detail})
    _report_cut(console, cut, len(texts))
    return rows


def _keep_cut(cut: set[int], numbers: Sequence[int], indices: Sequence[int]) -> None:
    cut.update(numbers[index] for index in indices)


def _report_cut(console: Console, cut: Collection[int], total: int) -> None:
    if cut:
        console.info(f"{len(cut)} of {total} sources were truncated to fit")


def _rounded(probabilities: Mapping[str, float]) -> dict[str, float]:
    return {label: round(share, 6) for label, share in probabilities.items()}


def unescape(text: str, number: int = 1) -> str:
    r"""Read the escapes of a text: `\n`, `\r`, `\t`, `\\` and `\uXXXX`.

    >>> unescape(r"two\nlines \\n")
    'two\nlines \\n'

    Args:
        text: As it was typed.
        number: Which text it is, for messages.

    Raises:
        ConfigError: Another escape.
    """

    def read(escape: re.Match[str]) -> str:
        plain = _PLAIN.get(escape[0])
        if plain is not None:
            return plain
        if len(escape[0]) == 6 and not 0xD800 <= int(escape[0][2:], 16) <= 0xDFFF:
            return chr(int(escape[0][2:], 16))
        raise ConfigError(
            f"text {number} has the escape {escape[0]}, but only \\n, \\r, \\t, \\\\ and \\uXXXX are read.",
            hint="write \\\\ for a backslash, or leave --escapes out.",
        )

    return _ESCAPE.sub(read, text)


def _stdin_lines(console: Console) -> list[str]:
    if sys.stdin is None or sys.stdin.isatty():
        raise ConfigError("there is no text to continue.", hint='give it as an argument ("..."), or as lines on stdin.')
    try:
        lines = [line.rstrip("\r\n") for line in sys.stdin]
    except UnicodeDecodeError as error:
        raise ConfigError(f"stdin is no UTF-8 text: {error}.", hint="convert it to UTF-8.") from error
    blank = [str(number) for number, line in enumerate(lines, start=1) if not line.strip()]
    if len(blank) == len(lines):
        raise ConfigError("stdin holds no text.", hint="give one source a line.")
    if blank:
        named = ", ".join(blank[:5]) + (f" and {len(blank) - 5} more" if len(blank) > 5 else "")
        several = len(blank) > 1
        console.info(
            f"line{'s' * several} {named} of stdin {'are' if several else 'is'} blank, and so "
            f"{'are their results' if several else 'is its result'}"
        )
    return lines


def register(command: AddCommand) -> None:
    """Add the command and its options to the command line."""
    parser = command(
        "generate",
        run,
        "generate with a prefix, from arguments or from lines on stdin",
        """

examples:
  prefixtune generate --prefix runs/e2e/prefix.safetensors "name : Aromi | Type : pub"
  prefixtune generate --prefix a.safetensors --prefix b.safetensors "text for a" "text for b"
  prefixtune generate --run runs/full "name : Aromi | Type : pub"
  prefixtune generate --prefix p.safetensors --escapes "first line\\nsecond line"
  cat sources.txt | prefixtune generate --prefix p.safetensors --json""",
    )
    parser.add_argument(
        "texts",
        nargs="*",
        metavar="TEXT",
        help="source, taken as typed (\\n is two characters: see --escapes); without any, lines are read from stdin, "
        "one result a line",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--prefix",
        action="append",
        default=[],
        metavar="FILE",
        help="a file, the folder of a run, or hub:OWNER/NAME; once for all texts, or once per text; none: bare model",
    )
    # `run` is what the command line calls.
    what.add_argument("--run", dest="run_folder", metavar="FOLDER", help="a run of `prefixtune train`, with any method")
    parser.add_argument(
        "--escapes",
        action="store_true",
        help="read \\n, \\r, \\t, \\\\ and \\uXXXX in the texts as characters",
    )
    parser.add_argument("--stream", action="store_true", help="print pieces as they come (one text)")
    add_json_and_quiet(parser, "one object a text")
    add_decoding_arguments(parser)
