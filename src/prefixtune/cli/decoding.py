"""Options of decoding, and the configuration made from them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prefixtune.cli.common import CommandParser
from prefixtune.errors import ConfigError

if TYPE_CHECKING:
    from prefixtune.inference.config import GenerateConfig
    from prefixtune.prefix.prefix import Prefix

__all__ = ["add_decoding_arguments", "generate_config"]


def add_decoding_arguments(parser: CommandParser) -> None:
    """Add the options of decoding and of the backbone; those of decoding have no default."""
    group = parser.add_argument_group("decoding", "defaults are those of the prefix's task")
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
    group.add_argument("--quantize", default="", metavar="{int8,int4}", help="quantize the frozen weights (torchao)")
    group.add_argument("--adapter", metavar="FOLDER", help="LoRA adapter (PEFT); default: the one of the prefix")
    group.add_argument("--allow-other-backbone", action="store_true", help="accept other weights of the same shapes")


def generate_config(options: argparse.Namespace, prefixes: Sequence[Prefix], task: str | None = None) -> GenerateConfig:
    """The decoding settings of the task, replaced by those of the options.

    Args:
        options: The options of the command.
        prefixes: The first one's header names the task, if `task` does not.
        task: The name of the task.

    Raises:
        ConfigError: A setting is wrong.
    """
    from prefixtune.data import TASKS
    from prefixtune.inference.config import GenerateConfig

    task_name = task or (prefixes[0].header.get("task") if prefixes else None)
    values: dict[str, Any] = dict(TASKS[task_name].decoding) if task_name in TASKS else {}
    names = GenerateConfig.model_fields
    flags = {name: value for name, value in vars(options).items() if name in names}
    if "stop" in flags:
        flags["stop"] = tuple(flags["stop"])
    if flags.get("temperature", 0) > 0 and "num_beams" not in flags:
        # --temperature asks for sampling, so the task's beam search is dropped.
        values.pop("num_beams", None)
    if {"max_new_tokens", "min_new_tokens"} & flags.keys() == {"max_new_tokens"}:
        fewest = values.get("min_new_tokens", 0)
        if 1 <= flags["max_new_tokens"] < fewest:
            raise ConfigError(
                f"--max-new-tokens is {flags['max_new_tokens']}, but outputs of the task {task_name!r} have at least "
                f"{fewest} tokens.",
                hint=f"raise it, or lower that too: --min-new-tokens {flags['max_new_tokens']}.",
            )
    return GenerateConfig(**{**values, **flags})
