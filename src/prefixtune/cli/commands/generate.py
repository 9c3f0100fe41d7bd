"""`prefixtune generate`: generate from texts with prefixes, or label them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from prefixtune.cli.decoding import DecodingOptions
from prefixtune.cli.loading import Trained, load_trained, read_trained, started_engine
from prefixtune.cli.options import PREFIX, Conflicts, PathText, command, option
from prefixtune.cli.show import for_stdout
from prefixtune.errors import ConfigError, RequestError
from prefixtune.utils.config import TextList

if TYPE_CHECKING:
    from prefixtune.backbone.backbone import Backbone
    from prefixtune.data.chat import Source
    from prefixtune.data.labels import Labels
    from prefixtune.engine.base import Engine
    from prefixtune.inference.classify import Prediction
    from prefixtune.prefix.prefix import Prefix


class GenerateOptions(DecodingOptions):
    """The options of `prefixtune generate`."""

    texts: TextList = option(
        (), "sources, as typed; without any, lines are read from stdin, one result a line", positional=True
    )
    data: str = option(
        "",
        "a file instead of texts, in any form that train reads: the answer to each row's last message",
        metavar="FILE",
    )
    form: str = option("", "form of --data, where several fit: messages, prompt, instruction, ...")
    prefix: TextList = option((), f"{PREFIX}; once for all texts, or once per text; none: bare model", metavar="FILE")
    route: bool = option(False, "of several memories, each text gets the one that its stored questions are nearest to")
    run_folder: PathText = option("", "a run of `prefixtune train`, with any method", flag="run", metavar="FOLDER")
    stream: bool = option(False, "print the text while it is generated (one text only)")

    def conflicts(self) -> Conflicts:
        """Also: options that exclude each other."""
        yield from super().conflicts()
        yield from self.apart("run_folder", "prefix")
        yield from self.only_with("prefix", "route")
        yield from self.apart("stream", "as_json")
        yield from self.apart("data", "texts", "stream")
        yield from self.only_with("data", "form")


@command
def generate(options: GenerateOptions) -> None:
    r"""Generate with a prefix, from arguments or from lines on stdin.

    The defaults of decoding are those of the prefix's task.

    For example:
        prefixtune generate --prefix runs/e2e/prefix.safetensors "name : Aromi | type : pub"
        prefixtune generate --prefix a.safetensors --prefix b.safetensors "text for a" "text for b"
        prefixtune generate --prefix manual.safetensors+style.safetensors "How do I reset it?"
        prefixtune generate --prefix a.safetensors --prefix b.safetensors --route "A question about a or b"
        prefixtune generate --run runs/full "name : Aromi | type : pub"
        prefixtune generate --prefix p.safetensors --data chats.jsonl --json
        prefixtune generate --prefix p.safetensors --engine llama.cpp "name : Aromi"
        cat sources.txt | prefixtune generate --prefix p.safetensors --json
    """
    from prefixtune.prefix.routing import router

    trained = read_trained(options, options.prefix, options.run_folder)
    config = options.configuration(trained.headers)
    if options.print_config:
        print(config.to_toml().rstrip())
        return
    lines = _read_texts(options, trained)
    # Blank lines of stdin have empty results, so that the lines of sources and results match.
    kept = [index for index, line in enumerate(lines) if options.texts or not isinstance(line, str) or line.strip()]
    labels = _common_labels(options, trained)
    find = router(trained.headers, options.prefix) if options.route else None
    if options.stream:
        from prefixtune.inference.generate import check_streams

        check_streams(config)
    backbone, prefixes, text_format = load_trained(options, trained)
    texts = [lines[index] for index in kept]
    if find is None:
        chosen = [index % len(prefixes) if prefixes else None for index in kept]
    else:
        from prefixtune.data.chat import as_conversation

        chosen = [find(as_conversation(text)[-1]["content"]) for text in texts]
    each = [None if number is None else prefixes[number] for number in chosen]
    cut: set[int] = set()
    work = _Work(backbone, texts, each, {"text_format": text_format, "config": config, "on_cut": cut.update})
    rows: list[dict[str, Any]] = []
    if labels is not None:
        rows = _label(options, work, labels)
    else:
        with started_engine(options, backbone, 1 if options.stream else len(texts), config.batch_size) as engine:
            if options.stream:
                _stream(work, engine)
            else:
                rows = _complete(options, work, engine)
    if cut:
        options.console.info(f"{len(cut)} of {len(texts)} sources were truncated to fit")
    if options.stream:
        return
    results = {at: {**row, "cut": index in cut} for index, (at, row) in enumerate(zip(kept, rows, strict=True))}
    names: Sequence[str | None] = options.prefix or ["+".join(files) for files in trained.files] or [None]
    used = dict(zip(kept, chosen, strict=True))
    for index, line in enumerate(lines):
        row = results.get(index, {"text": line, "output": "", "ended": True, "cut": False, "note": "the line is blank"})
        text = for_stdout(row["output"].replace("\n", "\\n").replace("\r", "\\r"))
        number = used.get(index, index % len(names))
        options.show({**row, "prefix": None if number is None else names[number]}, text)


def _read_texts(options: GenerateOptions, trained: Trained) -> list[Source]:
    """The texts of the arguments or of stdin, or the texts and conversations of a file.

    Raises:
        PrefixError: There is none, one is no UTF-8, or their number does not fit the other options.
    """
    lines: list[Source] = _read_data(options, trained) if options.data else [*(options.texts or _stdin_lines())]
    if options.stream and len(lines) != 1:
        raise ConfigError(
            f"--stream prints one text while it is generated, but got {len(lines)}.", hint="give one text."
        )
    if not options.route and len(options.prefix) > 1 and len(options.prefix) != len(lines):
        raise RequestError(
            f"{len(options.prefix)} prefixes for {len(lines)} texts.", hint="give --prefix once, or once per text."
        )
    return lines


def _stdin_lines() -> list[str]:
    from prefixtune.data.streams import STDIN, open_bytes, reading, text_lines

    lines: list[str] = []
    if sys.stdin is not None and not sys.stdin.isatty():
        with reading(Path(STDIN)):
            lines = [line.rstrip("\r\n") for line in text_lines(open_bytes(Path(STDIN)), "stdin")]
    if not any(line.strip() for line in lines):
        raise ConfigError("there is no text.", hint='give it as an argument ("..."), or as lines on stdin.')
    return lines


def _read_data(options: GenerateOptions, trained: Trained) -> list[Source]:
    """The source of every row of a file: of a conversation, all messages before the last answer; a text as it is.

    Rows that have the columns of the prefix's training are read as it read them, unless --form is given.
    """
    from prefixtune.data import TASKS
    from prefixtune.data.files import FORMATS, iter_file
    from prefixtune.data.forms import TEMPLATES, check_template, describe_data, detect_form, make_example
    from prefixtune.data.sets import locate

    path = locate(Path(options.data), None, FORMATS, {})
    sources = {_trained_source(header) for header in trained.headers}
    task, template = sources.pop() if len(sources) == 1 and not options.form else ("", "")
    first = next(iter_file(path))
    if template and set(check_template(template)) <= first.values.keys():
        form = TASKS[task].form or TEMPLATES
        examples = [make_example(record, form, templates=(template, "")) for record in iter_file(path)]
        options.console.info(f"{options.data}: read as in training, by {template!r}: {len(examples):,} rows")
        return [example.source for example in examples]
    form = detect_form(first.values, first.location, form=options.form, needs_targets=False)
    examples = [make_example(record, form) for record in iter_file(path)]
    options.console.info(describe_data(form, examples, options.data, first.values))
    return [example.messages or example.source or example.targets[0] for example in examples]


def _trained_source(header: Mapping[str, Any]) -> tuple[str, str]:
    """The task, and the column or template of the sources in the training of a prefix or a run; both may be empty."""
    from prefixtune.data import TASKS
    from prefixtune.prefix.text_format import read_text_format

    stored, task = read_text_format(header), str(header.get("task"))
    takes_columns = task in TASKS and TASKS[task].form is not None
    return (task, stored.source) if stored is not None and takes_columns else ("", "")


def _common_labels(options: GenerateOptions, trained: Trained) -> Labels | None:
    """The labels of the first prefix, or of the trained weights, where all classify or all tag; None: they generate.

    Raises:
        ConfigError: They are of several kinds, or label although --stream is set.
    """
    from prefixtune.data.labels import labels_in

    labels = [labels_in(header) for header in trained.headers]
    kinds = {"generation" if one is None else one.kind for one in labels}
    if kinds == {"generation"}:
        return None
    if len(kinds) > 1 or options.stream or options.engine != "torch":
        raise ConfigError(
            f"the prefixes are for {', '.join(sorted(kinds))}{', and --stream is set' * options.stream}.",
            hint="give prefixes of one kind at a time, and labels without --stream and --engine.",
        )
    return labels[0]


class _Work(NamedTuple):
    """Texts with their prefixes, what continues or labels them, and how: arguments of the library's functions."""

    backbone: Backbone
    texts: Sequence[Source]
    prefixes: Sequence[Prefix | None]
    how: Mapping[str, Any]


def _stream(work: _Work, engine: Engine | None) -> None:
    from prefixtune.inference.generate import stream

    for piece in stream(work.backbone, work.texts[0], work.prefixes[0], engine=engine, **work.how):
        print(for_stdout(piece), end="", flush=True)
    print()


def _complete(options: GenerateOptions, work: _Work, engine: Engine | None) -> list[dict[str, Any]]:
    """The output of every text."""
    from prefixtune.data.chat import as_conversation
    from prefixtune.inference.generate import generate

    unended: set[int] = set()
    with options.console.progress("generating", len(work.texts)) as bar:
        told: dict[str, Any] = {"on_batch": bar.update, "on_unended": unended.update}
        outputs = generate(work.backbone, work.texts, work.prefixes, engine=engine, **told, **work.how)
    shown = [{"text": text} if isinstance(text, str) else {"messages": as_conversation(text)} for text in work.texts]
    return [
        {**text, "output": output, "ended": index not in unended}
        for index, (text, output) in enumerate(zip(shown, outputs, strict=True))
    ]


def _label(options: GenerateOptions, work: _Work, labels: Labels) -> list[dict[str, Any]]:
    """The label or tags of every text, with their probabilities; without a prefix, by the words of `labels`."""
    from prefixtune.data.chat import as_conversation
    from prefixtune.inference.classify import classify, tag

    groups: dict[int, list[int]] = {}
    for index, prefix in enumerate(work.prefixes):
        groups.setdefault(id(prefix), []).append(index)
    rows: dict[int, dict[str, Any]] = {}
    with options.console.progress("labelling", len(work.texts)) as bar:
        for indices in groups.values():
            prefix = work.prefixes[indices[0]]
            # What is labelled is the text, or that of the last message.
            chosen = [as_conversation(work.texts[index])[-1]["content"] for index in indices]
            if prefix is not None and labels.kind == "tagging":
                found = tag(work.backbone, [text.split() for text in chosen], prefix, config=work.how["config"])
                made = [_tag_row(text, tags) for text, tags in zip(chosen, found, strict=True)]
            else:
                cut: set[int] = set()
                how = {**work.how, "on_cut": cut.update, "labels": labels if prefix is None else None}
                classes = classify(work.backbone, chosen, prefix, **how)
                work.how["on_cut"](indices[at] for at in cut)
                made = [_class_row(text, one) for text, one in zip(chosen, classes, strict=True)]
            rows |= dict(zip(indices, made, strict=True))
            bar.update(len(rows))
    return [rows[index] for index in range(len(work.texts))]


def _tag_row(text: str, tags: Sequence[Prediction]) -> dict[str, Any]:
    labels, shares = [token.label for token in tags], [_rounded(token) for token in tags]
    return {"text": text, "output": " ".join(labels), "tokens": text.split(), "tags": labels, "probabilities": shares}


def _class_row(text: str, one: Prediction) -> dict[str, Any]:
    return {"text": text, "output": one.label, "label": one.label, "probabilities": _rounded(one)}


def _rounded(one: Prediction) -> dict[str, float]:
    return {label: round(share, 6) for label, share in one.probabilities.items()}
