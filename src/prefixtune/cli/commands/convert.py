"""`prefixtune convert`: prefixes from and to other projects' formats."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixtune.cli.common import AddCommand, print_json
from prefixtune.errors import CheckpointError, ConfigError
from prefixtune.utils.console import Console

if TYPE_CHECKING:
    from prefixtune.backbone.backbone import Backbone
    from prefixtune.prefix.prefix import Prefix

__all__ = ["register"]


def register(command: AddCommand) -> None:
    """Add the command and its options to the command line."""
    parser = command(
        "convert",
        run,
        "take a prefix from PEFT or from the method's authors, or give one to PEFT",
        """The format of IN is detected.

examples:
  prefixtune convert runs/e2e/prefix.safetensors adapter --to peft
  prefixtune convert adapter prefix.safetensors --to prefixtune --backbone smollm2-135m
  prefixtune convert authors.safetensors prefix.safetensors --to prefixtune --backbone gpt2-medium""",
    )
    parser.add_argument(
        "input",
        metavar="IN",
        help="a prefix file, the folder of a PEFT adapter, or a checkpoint of the method's authors as safetensors",
    )
    parser.add_argument("output", metavar="OUT", help="a .safetensors file (prefixtune) or a folder (peft)")
    parser.add_argument("--to", required=True, choices=("peft", "prefixtune"), help="the format to write")
    parser.add_argument(
        "--backbone", metavar="ID", help="check that it fits this model; a checkpoint of the authors needs it"
    )
    parser.add_argument(
        "--peft-type",
        choices=("PREFIX_TUNING", "CARTRIDGE"),
        help="kind of PEFT adapter to write (default: what it came from, or else PREFIX_TUNING)",
    )
    parser.add_argument(
        "--frozen-tokens",
        type=int,
        metavar="N",
        help="CARTRIDGE: first positions that PEFT is not to train (default: 1)",
    )
    parser.add_argument("--json", action="store_true", help="print what was done as JSON on stdout")
    parser.add_argument("--quiet", action="store_true", help="no progress, only results and errors")


def run(options: argparse.Namespace) -> int:
    """`prefixtune convert`."""
    import torch

    from prefixtune.backbone.load import check_size
    from prefixtune.interop.peft import export_peft
    from prefixtune.prefix.artifact import save_prefix
    from prefixtune.utils.writable import check_writable

    _check_options(options)
    path, output = Path(options.input), Path(options.output)
    format_name = _detect_format(path)
    if format_name == "authors" and options.backbone is None:
        raise ConfigError(
            f"{options.input!r} is a checkpoint of the authors, which does not say the numbers of heads and layers.",
            hint="name its model: --backbone gpt2-medium, or the like.",
        )
    if format_name != "authors":
        # Read now: a wrong file is reported before the model loads.
        prefix = _read(path, format_name, None)
        if options.backbone is not None:
            check_size(prefix, options.backbone)
    check_writable(output if options.to == "prefixtune" else output / "adapter_config.json")
    backbone = _load_backbone(options)
    if backbone is not None:
        prefix = _read(path, format_name, backbone)
    if options.to == "peft":
        export_peft(prefix, output, backbone, peft_type=options.peft_type, num_frozen_tokens=options.frozen_tokens)
    else:
        save_prefix(output, prefix, dtype=torch.bfloat16 if prefix.dtype == torch.bfloat16 else torch.float32)
    if options.json:
        print_json(
            {"from": format_name, "to": options.to, "input": str(path), "output": str(output), **_describe(prefix)}
        )
    else:
        print(f"{output}: {prefix!r}, from {format_name}")
    return 0


def _check_options(options: argparse.Namespace) -> None:
    """Refuse options that do not go together, before anything is read.

    Raises:
        PrefixError: They do not.
    """
    output = Path(options.output)
    if options.frozen_tokens is not None and options.frozen_tokens < 0:
        raise ConfigError(
            f"--frozen-tokens is {options.frozen_tokens}, but must be 0 or above.", hint="1 keeps the first position."
        )
    if options.to != "peft" and (options.peft_type or options.frozen_tokens is not None):
        raise ConfigError("--peft-type and --frozen-tokens go with --to peft only.", hint="leave them out.")
    if options.to == "prefixtune" and output.suffix != ".safetensors":
        raise CheckpointError(
            f"{options.output!r} does not end with .safetensors.",
            hint=f"write to {output.stem or 'prefix'}.safetensors.",
        )
    if options.to == "peft" and output.exists() and not output.is_dir():
        raise ConfigError(f"{options.output!r} is a file, but an adapter is a folder.", hint="name a folder.")


def _load_backbone(options: argparse.Namespace) -> Backbone | None:
    """The backbone of --backbone."""
    if options.backbone is None:
        return None
    from prefixtune.backbone.load import check_loadable, load_backbone

    check_loadable(options.backbone, device="cpu")
    Console(quiet=options.quiet or options.json).info(f"loading {options.backbone} ...")
    return load_backbone(options.backbone, dtype="auto", device="cpu")


def _describe(prefix: Prefix) -> dict[str, Any]:
    """The backbone and the size of a prefix, for --json."""
    backbone = prefix.header.get("backbone") or {}
    return {
        "backbone": backbone.get("name") or None,
        "prefix_length": {site: prefix.length(site) for site in prefix.sites},
        "parameters": prefix.num_parameters,
    }


def _detect_format(path: Path) -> str:
    """The format of a file or folder: `peft`, `prefixtune` or `authors`."""
    from prefixtune.interop.authors import is_authors
    from prefixtune.interop.safetensors import read_tensors

    if path.is_dir():
        if not (path / "adapter_config.json").is_file():
            raise CheckpointError(
                f"the folder {str(path)!r} holds no adapter_config.json.",
                hint="give the folder that PEFT's save_pretrained wrote, or a file.",
            )
        return "peft"
    tensors, metadata = read_tensors(path)
    if "prefixtune" in metadata:
        return "prefixtune"
    if is_authors(tensors):
        return "authors"
    hint = "give a prefix of `prefixtune train`, a PEFT adapter's folder, or the authors' state dict."
    if "prompt_embeddings" in tensors:
        hint = f"it is one of the two files of a PEFT adapter: give its folder, {str(path.parent)!r}."
    raise CheckpointError(f"{str(path)!r} is a safetensors file, but in no known format of prefixes.", hint=hint)


def _read(path: Path, format_name: str, backbone: Backbone | None) -> Prefix:
    from prefixtune.backbone.prefixes import load_prefix
    from prefixtune.interop.authors import import_authors
    from prefixtune.interop.peft import import_peft

    if format_name == "authors" and backbone is not None:
        return import_authors(path, backbone)
    return import_peft(path, backbone) if format_name == "peft" else load_prefix(path, backbone)
