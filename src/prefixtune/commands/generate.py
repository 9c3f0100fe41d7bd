"""`prefixtune generate`: continue texts with prefixes, or tell their labels."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from prefixtune.commands.shared import generate_config, load_with_prefixes, print_json
from prefixtune.console import Console
from prefixtune.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from prefixtune.backbone import Backbone
    from prefixtune.generation import GenerateConfig
    from prefixtune.prefix import Prefix

__all__ = ["generate"]


def generate(options: argparse.Namespace) -> int:
    """`prefixtune generate`."""
    from prefixtune import generation
    from prefixtune.labelling import labels_of

    console = Console(quiet=options.quiet or options.json)
    texts = options.texts or _stdin_lines()
    if options.stream and (len(texts) != 1 or options.json):
        raise ConfigError(
            f"--stream shows one text as it comes, but got {len(texts)}.", hint="give one text, without --json."
        )
    if len(options.prefix) > 1 and len(options.prefix) != len(texts):
        raise RequestError(
            f"{len(options.prefix)} prefixes for {len(texts)} texts.", hint="give --prefix once, or once per text."
        )
    backbone, loaded = load_with_prefixes(console, options, options.prefix)
    config = generate_config(options, loaded)
    if any(labels_of(prefix) for prefix in loaded):
        return _tell_labels(options, console, backbone, loaded, texts, config)
    cut: set[int] = set()
    if options.stream:
        prefix = loaded[0] if loaded else None
        for piece in generation.stream(backbone, texts[0], prefix, config=config, on_cut=cut.update):
            print(piece, end="", flush=True)
        print()
        _report_cut(console, cut, len(texts))
        return 0
    prefixes: Any = None if not loaded else loaded[0] if len(loaded) == 1 else loaded
    with console.progress("generating", len(texts)) as bar:
        outputs = generation.generate(backbone, texts, prefixes, config=config, on_batch=bar.update, on_cut=cut.update)
    files = [None] * len(texts) if not loaded else options.prefix * len(texts) if len(loaded) == 1 else options.prefix
    for number, (text, output, file) in enumerate(zip(texts, outputs, files, strict=True)):
        if options.json:
            print_json({"text": text, "output": output, "prefix": file, "cut": number in cut})
        else:
            print(output.replace("\n", "\\n"))
    _report_cut(console, cut, len(texts))
    return 0


def _tell_labels(
    options: argparse.Namespace,
    console: Console,
    backbone: Backbone,
    loaded: Sequence[Prefix],
    texts: Sequence[str],
    config: GenerateConfig,
) -> int:
    """`prefixtune generate` with prefixes that classify or tag: labels, and with --json their probabilities."""
    from prefixtune.labelling import classify, labels_of, tag

    kinds = [labels.kind if (labels := labels_of(prefix)) else "generation" for prefix in loaded]
    if len(set(kinds)) > 1 or options.stream:
        raise ConfigError(
            f"the prefixes are for {', '.join(sorted(set(kinds)))}{', and --stream was asked for' * options.stream}.",
            hint="give prefixes of one kind at a time, and labels without --stream.",
        )
    each = list(loaded) * len(texts) if len(loaded) == 1 else list(loaded)
    files = options.prefix * len(texts) if len(loaded) == 1 else options.prefix
    groups: dict[int, list[int]] = {}
    for number, prefix in enumerate(each):
        groups.setdefault(id(prefix), []).append(number)
    results: dict[int, Any] = {}
    cut: set[int] = set()
    with console.progress("labelling", len(texts)) as bar:
        for numbers in groups.values():
            prefix, chosen = each[numbers[0]], [texts[number] for number in numbers]
            if kinds[0] == "tagging":
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
    for number, (text, file) in enumerate(zip(texts, files, strict=True)):
        result = results[number]
        if kinds[0] == "tagging":
            output = " ".join(token.label for token in result)
            detail: dict[str, Any] = {"tokens": text.split(), "tags": [token.label for token in result]}
            detail["probabilities"] = [_rounded(token.probabilities) for token in result]
        else:
            output, detail = result.label, {"label": result.label, "probabilities": _rounded(result.probabilities)}
            detail["cut"] = number in cut
        if options.json:
            print_json({"text": text, "output": output, **detail, "prefix": file})
        else:
            print(output)
    _report_cut(console, cut, len(texts))
    return 0


def _keep_cut(cut: set[int], numbers: Sequence[int], places: Sequence[int]) -> None:
    cut.update(numbers[place] for place in places)


def _report_cut(console: Console, cut: Collection[int], total: int) -> None:
    if cut:
        console.info(f"{len(cut)} of {total} sources were cut to fit")


def _rounded(probabilities: Mapping[str, float]) -> dict[str, float]:
    return {label: round(share, 6) for label, share in probabilities.items()}


def _stdin_lines() -> list[str]:
    if sys.stdin is None or sys.stdin.isatty():
        raise ConfigError("there is no text to continue.", hint='give it as an argument ("..."), or as lines on stdin.')
    try:
        lines = [line.rstrip("\r\n") for line in sys.stdin]
    except UnicodeDecodeError as error:
        raise ConfigError(f"stdin is no UTF-8 text: {error}.", hint="convert it to UTF-8.") from error
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise ConfigError("stdin holds no text.", hint="give one source a line.")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            # Leaving it out would shift every output after it against its source.
            raise ConfigError(f"line {number} of stdin is blank.", hint="give one source a line.")
    return lines
