"""`prefixtune export`: a prefix for llama.cpp, or with its backbone as an ONNX graph."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixtune.cli.common import AddCommand, print_json
from prefixtune.cli.loading import load_with_prefixes
from prefixtune.errors import ConfigError, did_you_mean
from prefixtune.utils.console import Console

if TYPE_CHECKING:
    from prefixtune.prefix.prefix import Prefix

__all__ = ["register"]


TARGETS = ("llama.cpp", "onnx")

_ONLY = {"state_version": "llama.cpp", "kv_type": "llama.cpp", "patch": "llama.cpp", "baked": "onnx"}
"""Option -> its target."""


def register(command: AddCommand) -> None:
    """Add the command and its options to the command line."""
    parser = command(
        "export",
        run,
        "write a prefix for llama.cpp, or with its backbone as an ONNX graph",
        """

examples:
  prefixtune export runs/e2e/prefix.safetensors --to llama.cpp --output exported
  prefixtune export runs/e2e/prefix.safetensors --to llama.cpp --output exported --patch slots/placeholders.bin
  prefixtune export runs/e2e/prefix.safetensors --to onnx --output exported --baked""",
    )
    parser.add_argument(
        "prefix",
        metavar="PREFIX",
        help="a .safetensors file of `prefixtune train`, the folder of its run, or hub:OWNER/NAME",
    )
    parser.add_argument("--to", required=True, metavar="{" + ",".join(TARGETS) + "}", help="the runtime")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the exported files")
    group = parser.add_argument_group("llama.cpp")
    group.add_argument(
        "--state-version",
        type=int,
        metavar="{2,3,4}",
        help="layout of the state file; it depends on the build of llama.cpp (default: 4)",
    )
    group.add_argument("--kv-type", metavar="{f16,f32,bf16}", help="type of the server's cache (default: f16)")
    group.add_argument(
        "--patch",
        metavar="SLOT_FILE",
        help="a slot that your own build saved with the placeholders: the prefix is written into it, in any layout",
    )
    group = parser.add_argument_group("onnx")
    group.add_argument(
        "--baked",
        action="store_true",
        default=None,
        help="put the prefix into the graph, for runtimes that cannot start from a given past",
    )
    group = parser.add_argument_group("backbone")
    group.add_argument("--backbone", help="default: the one in the prefix's header")
    group.add_argument("--dtype", default="float32", help="of the loaded backbone; onnx: float32 (default: float32)")
    group.add_argument("--device", default="cpu", help="auto, cpu, cuda, mps (default: cpu)")
    group.add_argument("--adapter", metavar="FOLDER", help="LoRA adapter (PEFT); default: the one of the prefix")
    group.add_argument("--allow-other-backbone", action="store_true", help="accept other weights of the same shapes")
    parser.add_argument("--json", action="store_true", help="print the contents of export.json on stdout")
    parser.add_argument("--quiet", action="store_true", help="no progress, only results and errors")
    parser.set_defaults(quantize="")


def run(options: argparse.Namespace) -> int:
    """`prefixtune export`."""
    _check_options(options)
    from prefixtune.utils.writable import check_writable

    folder, console = Path(options.output), Console(quiet=options.quiet)
    check_writable(folder / "export.json")
    backbone, (prefix,) = load_with_prefixes(console, options, [options.prefix], partial(_check_prefixes, options.to))
    console.info(f"exporting to {options.to} ...")
    if options.to == "onnx":
        from prefixtune.interop.onnx.export import export_onnx

        facts = export_onnx(prefix, backbone, folder, baked=bool(options.baked))
        note = f"its logits are within {facts['max_difference']:.2g} of the backbone's"
    else:
        from prefixtune.interop.llama_cpp.export import export_llama_cpp

        layout: dict[str, Any] = {"state_version": options.state_version, "kv_type": options.kv_type}
        facts = export_llama_cpp(
            prefix,
            backbone,
            folder,
            name=Path(options.prefix).stem,
            slot_file=options.patch,
            **{name: value for name, value in layout.items() if value is not None},
        )
        note = f"run {folder / 'check.py'} against the server, which also answers if the prefix is not loaded"
    if options.json:
        print_json({**facts, "folder": str(folder)})
    else:
        print(f"{folder / facts['file']}; {note} ({folder / 'README.md'})")
    return 0


def _check_prefixes(target: str, prefixes: Sequence[Prefix]) -> None:
    from prefixtune.interop.export import check_prefix

    for prefix in prefixes:
        check_prefix(prefix, "ONNX" if target == "onnx" else target)


def _check_options(options: argparse.Namespace) -> None:
    """Refuse options that do not go together, before anything loads.

    Raises:
        PrefixError: They do not, or a file or library is missing.
    """
    if options.to not in TARGETS:
        raise ConfigError(f"there is no target {options.to!r}.", hint=did_you_mean(options.to, TARGETS))
    for name, target in _ONLY.items():
        if getattr(options, name) is not None and options.to != target:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} is for {target}, but the target is {options.to}.", hint=f"leave {flag} out.")
    for name in ("state_version", "kv_type"):
        if options.patch is not None and getattr(options, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} cannot go with --patch, since the slot file decides.", hint=f"leave {flag} out.")
    if options.to == "llama.cpp":
        from prefixtune.interop.llama_cpp.state import STATE_VERSIONS, check_choice

        check_choice(options.state_version or STATE_VERSIONS[-1], options.kv_type or "f16")
        if options.patch is not None and not Path(options.patch).is_file():
            raise ConfigError(
                f"cannot read the slot file {options.patch!r}: there is no such file.", hint="check the path."
            )
    if Path(options.output).exists() and not Path(options.output).is_dir():
        raise ConfigError(f"--output is {options.output!r}, which is a file.", hint="name a folder.")
    if options.to == "onnx":
        from prefixtune.interop.onnx.export import require_onnx

        require_onnx()
