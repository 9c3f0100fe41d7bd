"""`prefixtune generate`: generate from texts with prefixes, or label them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from prefixtune.cli.decoding import DecodingOptions, generate_config, note_unused
from prefixtune.cli.loading import (
    Artifact,
    find_artifact,
    load_artifact,
    load_with_prefixes,
    read_prefix,
    started_engine,
)
from prefixtune.cli.options import OutputOptions, PathText, command, json_option, positional
from prefixtune.cli.show import show
from prefixtune.errors import ConfigError, RequestError
from prefixtune.utils.config import TextList
from prefixtune.utils.console import Console, safe_text

if TYPE_CHECKING:
    from prefixtune.data.chat import Source
    from prefixtune.data.labels import Labels
    from prefixtune.inference.classify import Prediction
    from prefixtune.inference.config import GenerateConfig
    from prefixtune.prefix.prefix import Prefix
    from prefixtune.prefix.text_format import TextFormat

__all__ = ["generate", "unescape"]


# Half characters (\ud800 to \udfff) are no text.
_ESCAPE = re.compile(r"\\(?:u(?![dD][89a-fA-F])[0-9a-fA-F]{4}|[nrt\\])")


class GenerateOptions(DecodingOptions, OutputOptions):
    """The options of `prefixtune generate`."""

    texts: TextList = positional(
        (),
        description="sources, taken as typed (\\n is two characters: see --escapes); without any, lines are read from "
        "stdin, one result a line",
    )
    data: str = Field(
        "",
        description="a file instead of texts, in any form that train reads: conversations, prompts, texts, ...; each "
        "row's last user message is answered, one result a row",
        json_schema_extra={"metavar": "FILE"},
    )
    form: str = Field("", description="form of --data, where several fit: messages, prompt, instruction, ...")
    prefix: TextList = Field(
        (),
        description="a file, the folder of a run, or hub:OWNER/NAME; A+B joins several; once for all texts, or once "
        "per text; none: bare model",
        json_schema_extra={"metavar": "FILE"},
    )
    run_folder: PathText = Field(
        "",
        description="a run of `prefixtune train`, with any method",
        json_schema_extra={"flag": "run", "metavar": "FOLDER"},
    )
    escapes: bool = Field(False, description="read \\n, \\r, \\t, \\\\ and \\uXXXX in the texts as characters")
    stream: bool = Field(False, description="print the text while it is generated (one text only)")
    as_json: bool = json_option("one object a text")

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Options that exclude each other, and texts that are missing or too many."""
        yield from super().conflicts()
        if self.prefix and self.run_folder:
            yield ("prefix", "run_folder"), "--prefix cannot go with --run, whose prefix is used; give one of the two"
        if self.stream and self.as_json:
            yield ("stream", "as_json"), "--stream prints one text while it is generated, and cannot go with --json"
        if self.data and (self.texts or self.stream):
            other = "texts" if self.texts else "stream"
            yield ("data", other), "--data gives the texts, one result a row; leave out --stream and other texts"
        if self.form and not self.data:
            yield ("form", "data"), "--form says what the columns of --data are: give --data FILE too"
        if not (self.texts or self.data) and not self.print_config and (sys.stdin is None or sys.stdin.isatty()):
            yield ("texts",), 'there is no text to continue: give it as an argument ("..."), or as lines on stdin'


@command
def generate(options: GenerateOptions) -> int:
    r"""Generate with a prefix, from arguments or from lines on stdin.

    The defaults of decoding are those of the prefix's task.

    For example:
        prefixtune generate --prefix runs/e2e/prefix.safetensors "name : Aromi | type : pub"
        prefixtune generate --prefix a.safetensors --prefix b.safetensors "text for a" "text for b"
        prefixtune generate --prefix manual.safetensors+style.safetensors "How do I reset it?"
        prefixtune generate --run runs/full "name : Aromi | type : pub"
        prefixtune generate --prefix p.safetensors --escapes "first line\nsecond line"
        prefixtune generate --prefix p.safetensors --data chats.jsonl --json
        prefixtune generate --prefix p.safetensors --engine llama.cpp "name : Aromi"
        cat sources.txt | prefixtune generate --prefix p.safetensors --json
    """
    console = Console(quiet=options.quiet)
    artifact = find_artifact(options, None) if options.run_folder else Artifact()
    stored = {name: read_prefix(name).header for name in dict.fromkeys(options.prefix)}
    headers = list(stored.values()) or [artifact.header]
    config = generate_config(options, headers)
    if options.print_config:
        print(config.to_toml().rstrip())
        return 0
    lines = _read_texts(options, console, headers)
    # Blank lines of stdin have empty results, so that the lines of sources and results match.
    kept = [index for index, line in enumerate(lines) if options.texts or not isinstance(line, str) or line.strip()]
    names = [artifact.prefix] if artifact.prefix else list(options.prefix)
    note_unused(console, options, config)
    labels = _common_labels(headers, options)
    if options.stream and labels is None:
        from prefixtune.inference.generate import check_streams

        check_streams(config)
    work = _Work(console, options, config, [lines[index] for index in kept])
    if artifact.weights is not None:
        work.backbone, _, work.text_format = load_artifact(console, options, artifact)
    else:
        used = [names[index] for index in kept] if len(names) > 1 else names
        work.backbone, work.prefixes = load_with_prefixes(console, options, used)
    if options.stream and labels is None:
        work.stream()
        return 0
    rows = work.generate() if labels is None else work.label(labels)
    _print_rows(options, lines, dict(zip(kept, rows, strict=True)), names)
    return 0


def _read_texts(options: GenerateOptions, console: Console, headers: Sequence[Mapping[str, Any]]) -> list[Source]:
    """The texts of the arguments or of stdin, or the texts and conversations of a file.

    Raises:
        PrefixError: There is none, one is no UTF-8, or their number does not fit the other options.
    """
    lines: list[Source]
    if options.data:
        lines = _read_data(options, console, headers)
    else:
        typed = list(options.texts) or _stdin_lines()
        lines = [*map(unescape, typed)] if options.escapes else [*typed]
    if options.stream and len(lines) != 1:
        raise ConfigError(
            f"--stream prints one text while it is generated, but got {len(lines)}.", hint="give one text."
        )
    if len(options.prefix) > 1 and len(options.prefix) != len(lines):
        raise RequestError(
            f"{len(options.prefix)} prefixes for {len(lines)} texts.", hint="give --prefix once, or once per text."
        )
    return lines


def _read_data(options: GenerateOptions, console: Console, headers: Sequence[Mapping[str, Any]]) -> list[Source]:
    """The source of every row of a file: of a conversation, all messages before the last answer; a text as it is.

    Rows that have the columns of the prefix's training are read as it read them, unless --form is given.
    """
    from prefixtune.data.files import FORMATS, iter_file
    from prefixtune.data.forms import check_template, describe_data, make_example
    from prefixtune.data.registry import read_sources, resolve_task
    from prefixtune.data.sets import locate

    path = locate(Path(options.data), None, FORMATS, {})
    trained = {_trained_source(header) for header in headers}
    task, template = trained.pop() if len(trained) == 1 and not options.form else ("", "")
    if template and set(check_template(template)) <= next(iter_file(path)).values.keys():
        sources = read_sources(task, path, template)
        console.info(f"{options.data}: read as in training, by {template!r}: {len(sources):,} rows")
        return [*sources]
    _, form, row = resolve_task("records", path, form=options.form, needs_targets=False)
    assert form is not None
    examples = [make_example(record, form) for record in iter_file(path)]
    console.info(describe_data(form, examples, options.data, row))
    return [example.messages or example.source or example.targets[0] for example in examples]


def _trained_source(header: Mapping[str, Any]) -> tuple[str, str]:
    """The task, and the column or template of the sources in the training of a prefix or a run; both may be empty."""
    from prefixtune.data import TASKS
    from prefixtune.prefix.text_format import read_text_format

    stored, task = read_text_format(header), str(header.get("task"))
    takes_columns = task in TASKS and TASKS[task].takes_columns
    return (task, stored.source) if stored is not None and takes_columns else ("", "")


def _shown(source: Source) -> dict[str, Any]:
    """A source in a result."""
    from prefixtune.data.chat import as_conversation

    return {"text": source} if isinstance(source, str) else {"messages": as_conversation(source)}


def _common_labels(headers: Sequence[Mapping[str, Any]], options: GenerateOptions) -> Labels | None:
    """The labels of the first prefix, or of the trained weights, where all classify or all tag; None: they generate.

    Raises:
        ConfigError: They are of several kinds, or label although --stream is set.
    """
    from prefixtune.data.labels import labels_in

    labels = [labels_in(header) for header in headers]
    kinds = {"generation" if one is None else one.kind for one in labels}
    if kinds <= {"generation"}:
        return None
    if len(kinds) > 1 or options.stream or options.engine != "torch":
        raise ConfigError(
            f"the prefixes are for {', '.join(sorted(kinds))}{', and --stream is set' * options.stream}.",
            hint="give prefixes of one kind at a time, and labels without --stream and --engine.",
        )
    return labels[0]


@dataclass
class _Work:
    """Texts, and what continues or labels them."""

    console: Console
    options: GenerateOptions
    config: GenerateConfig
    texts: Sequence[Source]
    backbone: Any = None
    prefixes: Sequence[Prefix] = ()
    text_format: TextFormat | None = None

    def stream(self) -> None:
        """Print the output of one text while it is generated."""
        from prefixtune.inference.generate import stream

        cut: set[int] = set()
        with started_engine(self.console, self.options, self.backbone, 1) as engine:
            for piece in stream(
                self.backbone,
                self.texts[0],
                next(iter(self.prefixes), None),
                text_format=self.text_format,
                config=self.config,
                engine=engine,
                on_cut=cut.update,
            ):
                print(_for_stdout(piece), end="", flush=True)
        print()
        self._report_cut(len(cut))

    def generate(self) -> list[dict[str, Any]]:
        """The output of every text."""
        from prefixtune.inference.generate import generate

        cut: set[int] = set()
        unended: set[int] = set()
        num_slots = max(1, min(self.config.batch_size, len(self.texts)))
        with (
            started_engine(self.console, self.options, self.backbone, num_slots) as engine,
            self.console.progress("generating", len(self.texts)) as bar,
        ):
            outputs = generate(
                self.backbone,
                self.texts,
                self.prefixes[0] if len(self.prefixes) == 1 else self.prefixes or None,
                text_format=self.text_format,
                config=self.config,
                engine=engine,
                on_batch=bar.update,
                on_cut=cut.update,
                on_unended=unended.update,
            )
        self._report_cut(len(cut))
        return [
            {**_shown(text), "output": output, "cut": index in cut, "ended": index not in unended}
            for index, (text, output) in enumerate(zip(self.texts, outputs, strict=True))
        ]

    def label(self, labels: Labels) -> list[dict[str, Any]]:
        """The label or tags of every text, with their probabilities; without a prefix, by the words of `labels`."""
        from prefixtune.data.chat import as_conversation
        from prefixtune.inference.classify import classify, tag

        # What is labelled is the text, or that of the last message.
        texts = [as_conversation(text)[-1]["content"] for text in self.texts]
        rows: dict[int, dict[str, Any]] = {}
        with self.console.progress("labelling", len(texts)) as bar:
            for prefix, indices in self._by_prefix():
                chosen = [texts[index] for index in indices]
                if prefix is not None and labels.kind == "tagging":
                    found = tag(self.backbone, [text.split() for text in chosen], prefix, config=self.config)
                    made = [_tag_row(text, tags) for text, tags in zip(chosen, found, strict=True)]
                else:
                    cut: set[int] = set()
                    classes = classify(
                        self.backbone,
                        chosen,
                        prefix,
                        labels=labels if prefix is None else None,
                        text_format=self.text_format,
                        config=self.config,
                        on_cut=cut.update,
                    )
                    made = [_class_row(chosen[at], result, at in cut) for at, result in enumerate(classes)]
                rows |= dict(zip(indices, made, strict=True))
                bar.update(len(rows))
        self._report_cut(sum(row.get("cut", False) for row in rows.values()))
        return [rows[index] for index in range(len(texts))]

    def _by_prefix(self) -> Sequence[tuple[Prefix | None, Sequence[int]]]:
        """Every prefix with the indices of its texts; one prefix is for all texts, and so is none."""
        if len(self.prefixes) < 2:
            return [(next(iter(self.prefixes), None), range(len(self.texts)))]
        groups: dict[int, tuple[Prefix, list[int]]] = {}
        for index, prefix in enumerate(self.prefixes):
            groups.setdefault(id(prefix), (prefix, []))[1].append(index)
        return list(groups.values())

    def _report_cut(self, count: int) -> None:
        if count:
            self.console.info(f"{count} of {len(self.texts)} sources were truncated to fit")


def _print_rows(
    options: GenerateOptions, lines: Sequence[Source], rows: Mapping[int, Mapping[str, Any]], names: Sequence[str]
) -> None:
    """Print one result per line of input, in order.

    Args:
        options: Whether as JSON.
        lines: The input.
        rows: Index of a line -> its result; a blank line has none.
        names: Of the prefixes: none, one for all lines, or one for each.
    """
    facts = next(iter(rows.values()), {})
    blank = {name: value for name, value in (("cut", False), ("ended", True)) if name in facts}
    for index, line in enumerate(lines):
        row = rows.get(index, {"text": line, "output": "", **blank, "note": "the line is blank"})
        name = names[index if len(names) > 1 else 0] if names else None
        # Every result is one line.
        show({**row, "prefix": name}, _for_stdout(_escaped(str(row["output"]))), as_json=options.as_json)


def _escaped(text: str) -> str:
    return text.replace("\n", "\\n").replace("\r", "\\r")


def _for_stdout(text: str) -> str:
    """A model's text, without what would steer a terminal that shows it."""
    return safe_text(text.replace("\r", "")) if sys.stdout.isatty() else text


def _tag_row(text: str, tags: Sequence[Prediction]) -> dict[str, Any]:
    labels = [token.label for token in tags]
    probabilities = [_rounded(token.probabilities) for token in tags]
    return {
        "text": text,
        "output": " ".join(labels),
        "tokens": text.split(),
        "tags": labels,
        "probabilities": probabilities,
    }


def _class_row(text: str, result: Prediction, cut: bool) -> dict[str, Any]:
    probabilities = _rounded(result.probabilities)
    return {"text": text, "output": result.label, "label": result.label, "probabilities": probabilities, "cut": cut}


def _rounded(probabilities: Mapping[str, float]) -> dict[str, float]:
    return {label: round(share, 6) for label, share in probabilities.items()}


def unescape(text: str) -> str:
    r"""Read the escapes of a text: `\n`, `\r`, `\t`, `\\` and `\uXXXX`; what is none stays as it is.

    >>> unescape(r"two\nlines \\n")
    'two\nlines \\n'
    """
    return _ESCAPE.sub(lambda escape: json.loads(f'"{escape[0]}"'), text)


def _stdin_lines() -> list[str]:
    """The lines of stdin.

    Raises:
        ConfigError: There is no text.
        DataError: A line is too long, or is no UTF-8 text.
    """
    from prefixtune.data.streams import STDIN, open_bytes, reading, text_lines

    with reading(Path(STDIN)):
        lines = [line.rstrip("\r\n") for line in text_lines(open_bytes(Path(STDIN)), "stdin")]
    if not any(line.strip() for line in lines):
        raise ConfigError("stdin holds no text.", hint="give one source a line.")
    return lines
