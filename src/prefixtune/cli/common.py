"""What several commands need: loading a backbone with its prefixes, decoding settings, training with its events shown.

Results go to stdout, progress and messages to stderr. Heavy modules are imported inside the functions, so that `--help`
and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from prefixtune.errors import ConfigError, check_all
from prefixtune.training.config import TrainConfig
from prefixtune.utils.console import Console

if TYPE_CHECKING:
    from prefixtune.backbone.backbone import Backbone
    from prefixtune.inference.config import GenerateConfig
    from prefixtune.prefix.prefix import Prefix
    from prefixtune.prefix.text_format import TextFormat

__all__ = [
    "DEFAULT_BACKBONE",
    "find_artifact",
    "generate_config",
    "load",
    "load_artifact",
    "load_with_prefixes",
    "print_json",
    "run_training",
    "run_training_together",
]


DEFAULT_BACKBONE = "smollm2-135m"


def print_json(value: object) -> None:
    """One JSON value on a line of stdout, at once."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def load(console: Console, name: str, options: argparse.Namespace, adapter: str | None = None) -> Backbone:
    """Load a backbone as the options of decoding say, telling so."""
    from prefixtune.backbone.load import load_backbone

    _check_loadable(options, name, adapter)
    with_adapter = f" with the adapter {adapter}" if adapter else ""
    console.info(f"loading {name}{with_adapter} ...")
    backbone = load_backbone(
        name, dtype=options.dtype, device=options.device, quantize=options.quantize, adapter=adapter
    )
    console.info(f"{backbone!r}")
    return backbone


def load_with_prefixes(
    console: Console,
    options: argparse.Namespace,
    files: Sequence[str],
    check: Callable[[Sequence[Prefix]], object] | None = None,
) -> tuple[Backbone, list[Prefix]]:
    """The backbone that the prefixes name (or that was asked for), and the prefixes, checked against it.

    Args:
        console: Says what is loaded.
        options: Of the command.
        files: The prefixes': paths, folders of runs or `hub:OWNER/NAME`.
        check: What else could be wrong with the prefixes and options; called before the backbone loads.
    """
    from prefixtune.backbone.load import check_size
    from prefixtune.backbone.prefixes import load_prefix
    from prefixtune.prefix.hub import prefix_file
    from prefixtune.prefix.text_format import read_text_format

    # Read first: a wrong file is reported at once, before the model loads.
    files = [str(prefix_file(file)) for file in files]
    loaded = [load_prefix(file) for file in files]
    names = {str((prefix.header.get("backbone") or {}).get("name") or "") for prefix in loaded} - {""}
    if options.backbone is None and len(names) > 1:
        raise ConfigError(
            f"the prefixes name different backbones: {', '.join(sorted(names))}.",
            hint="generate for one at a time, or pass --backbone.",
        )
    name = options.backbone or next(iter(names), DEFAULT_BACKBONE)
    adapter = _adapter(options, files, loaded)
    check_all(
        [
            partial(_check_loadable, options, name, adapter),
            *(partial(read_text_format, prefix.header) for prefix in loaded),
            *(partial(check_size, prefix, name) for prefix in loaded),
            *([] if check is None else [partial(check, loaded)]),
        ]
    )
    backbone = load(console, name, options, adapter)
    checked = [load_prefix(file, backbone, allow_other_backbone=options.allow_other_backbone) for file in files]
    return backbone, checked


def _check_loadable(options: argparse.Namespace, name: str, adapter: str | None = None) -> None:
    from prefixtune.backbone.load import check_loadable

    check_loadable(name, dtype=options.dtype, device=options.device, quantize=options.quantize, adapter=adapter)


def _adapter(options: argparse.Namespace, files: Sequence[str], loaded: Sequence[Prefix]) -> str | None:
    """The LoRA adapter that was asked for, or that the prefixes were trained with."""
    if options.adapter:
        return str(options.adapter)
    named = set()
    for file, prefix in zip(files, loaded, strict=True):
        given = prefix.header.get("adapter")
        beside = Path(file).parent / str(given)
        named.add(None if not given else str(beside) if beside.is_dir() else str(given))
    if len(named) > 1:
        raise ConfigError(
            f"the prefixes were trained with different adapters: {', '.join(sorted(str(n) for n in named))}.",
            hint="generate for one at a time.",
        )
    return named.pop() if named else None


def find_artifact(options: argparse.Namespace, file: str | None) -> tuple[str | None, Path | None, Mapping[str, Any]]:
    """The file of the prefix, or that of trained weights, and what either says; neither: the bare model.

    Args:
        options: With `--run`, whose prefix or weights are taken.
        file: The prefix that was named: a path, the folder of a run or `hub:OWNER/NAME`.
    """
    from prefixtune.backbone.prefixes import load_prefix
    from prefixtune.prefix.hub import prefix_file
    from prefixtune.training.artifact import load_weights
    from prefixtune.training.folder import PREFIX_FILE, WEIGHTS_FILE

    if options.run_folder:
        folder = Path(options.run_folder)
        weights = folder / WEIGHTS_FILE
        if os.path.isfile(weights):  # Path.is_file raises where the folder is closed to us
            for name in ("quantize", "adapter"):
                if getattr(options, name):
                    raise ConfigError(
                        f"--{name} is {getattr(options, name)!r}, but {str(weights)!r} holds weights of its own.",
                        hint=f"leave --{name} out; it goes with a prefix or the bare model.",
                    )
            return None, weights, load_weights(weights)[1]
        if not os.path.isfile(folder / PREFIX_FILE):
            raise ConfigError(
                f"{options.run_folder!r} holds neither {PREFIX_FILE} nor {WEIGHTS_FILE}.",
                hint="give the --output folder of a `prefixtune train` that came to its end.",
            )
        file = str(folder / PREFIX_FILE)
    if not file:
        return None, None, {}
    file = str(prefix_file(file))
    return file, None, load_prefix(file).header


def load_artifact(
    console: Console, options: argparse.Namespace, file: str | None, weights: Path | None
) -> tuple[Backbone, Prefix | None, TextFormat | None]:
    """The model, prefix and text format of what `find_artifact` found."""
    if weights is not None:
        from prefixtune.backbone.devices import choose_device, choose_dtype
        from prefixtune.training.artifact import load_tuned

        choose_dtype(options.dtype, choose_device(options.device))
        console.info(f"loading {weights} ...")
        chosen = {"name_or_path": options.backbone, "dtype": options.dtype, "device": options.device}
        backbone, form = load_tuned(weights, **chosen)
        return backbone, None, form
    backbone, loaded = load_with_prefixes(console, options, [file] if file else [])
    return backbone, loaded[0] if loaded else None, None


def generate_config(options: argparse.Namespace, prefixes: Sequence[Prefix], task: str | None = None) -> GenerateConfig:
    """The task's decoding defaults, with the given flags over them."""
    import dataclasses

    from prefixtune.data import TASKS
    from prefixtune.inference.config import GenerateConfig

    named = task or (prefixes[0].header.get("task") if prefixes else None)
    values: dict[str, Any] = dict(TASKS[named].decoding) if named in TASKS else {}
    names = {field.name for field in dataclasses.fields(GenerateConfig)}
    given = {name: value for name, value in vars(options).items() if name in names}
    if "stop" in given:
        given["stop"] = tuple(given["stop"])
    if given.get("temperature", 0) > 0 and "num_beams" not in given:
        # Sampling was asked for: a task's beam search gives way.
        values.pop("num_beams", None)
    if {"max_new_tokens", "min_new_tokens"} & given.keys() == {"max_new_tokens"}:
        fewest = values.get("min_new_tokens", 0)
        if 1 <= given["max_new_tokens"] < fewest:
            raise ConfigError(
                f"--max-new-tokens is {given['max_new_tokens']}, but outputs of the task {named!r} have at least "
                f"{fewest} tokens.",
                hint=f"raise it, or lower that too: --min-new-tokens {given['max_new_tokens']}.",
            )
    return GenerateConfig.from_mapping({**values, **given})


def run_training(
    console: Console, config: TrainConfig, *, resume: bool = False, as_json: bool = False, **given: Any
) -> Any:
    """`training.train` with its progress shown, or with its events as JSON lines."""
    from prefixtune.training.train import train as run

    try:
        return run(
            config,
            resume=resume,
            progress=not (console.quiet or as_json),
            on_event=_print_event if as_json else None,
            **given,
        )
    except KeyboardInterrupt as stopped:
        resume_line = f"go on with `prefixtune train --resume --output {config.output}`."
        if str(stopped):
            raise KeyboardInterrupt(f"{stopped}; {resume_line}") from None
        if (Path(config.output) / "state.safetensors").exists():
            raise KeyboardInterrupt(f"stopped at once; the last save is kept; {resume_line}") from None
        raise KeyboardInterrupt("nothing was trained yet.") from None


def run_training_together(
    console: Console, configs: Sequence[TrainConfig], *, resume: bool = False, as_json: bool = False
) -> Any:
    """`training.train_together` with its progress shown, or with its events as JSON lines."""
    from prefixtune.training.progress import show_training
    from prefixtune.training.train import train_together as run

    console.info(f"{len(configs)} runs share the backbone {configs[0].backbone}")
    with show_training(console, num_runs=len(configs)) as show:
        try:
            return run(configs, resume=resume, on_event=_print_event if as_json else show)
        except KeyboardInterrupt as stopped:
            kept = str(stopped) or "stopped at once; the last saves are kept"
            raise KeyboardInterrupt(f"{kept}; go on with the same command and --resume.") from None


def _print_event(event: dict[str, Any]) -> None:
    # A reader such as `head` may leave; the training goes on.
    with suppress(BrokenPipeError):
        print_json(event)


class CommandParser(argparse.ArgumentParser):
    """argparse, with this project's way of reporting mistakes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}.", hint=f"`{self.prog} --help` explains the options.")

    def options(self) -> list[str]:
        """Every long option."""
        return [text for action in self._actions for text in action.option_strings if text.startswith("--")]


AddCommand = Callable[..., CommandParser]


def add_json_and_quiet(parser: CommandParser, what: str) -> None:
    parser.add_argument("--json", action="store_true", help=f"print {what} as JSON on stdout")
    parser.add_argument("--quiet", action="store_true", help="no progress, only results and errors")


def add_decoding_arguments(parser: CommandParser) -> None:
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
