"""`prefixtune convert`: prefixes from and to other projects' formats."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from prefixtune.cli.common import print_json
from prefixtune.cli.options import OutputOptions, command, json_option, positional
from prefixtune.errors import CheckpointError
from prefixtune.utils.console import Console

if TYPE_CHECKING:
    from prefixtune.backbone.backbone import Backbone
    from prefixtune.prefix.prefix import Prefix

__all__ = ["convert"]


class ConvertOptions(OutputOptions):
    """The options of `prefixtune convert`."""

    input: str = positional(
        description="a prefix: a file, the folder of its run, or hub:OWNER/NAME; or the folder of a PEFT adapter"
    )
    output: str = positional(description="a .safetensors file (prefixtune) or a folder (peft)")
    to: Literal["peft", "prefixtune"] = Field(description="the format to write")
    backbone: str | None = Field(None, description="check that it fits this model")
    peft_type: Literal["PREFIX_TUNING", "CARTRIDGE", ""] = Field(
        "", description="kind of PEFT adapter to write (default: what it came from, or else PREFIX_TUNING)"
    )
    frozen_tokens: int | None = Field(
        None, ge=0, description="CARTRIDGE: first positions that PEFT is not to train (default: 1)"
    )
    as_json: bool = json_option("what was done")

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Options and an output that do not go with the format to write."""
        output = Path(self.output)
        for name in ("peft_type", "frozen_tokens") if self.to != "peft" else ():
            if getattr(self, name) != self.default(name):
                yield (name, "to"), f"{self.flag(name)} goes with --to peft only; leave it out"
        if self.to == "prefixtune" and output.suffix != ".safetensors":
            yield (
                ("output", "to"),
                f"{self.output!r} does not end with .safetensors; write to {output.stem or 'prefix'}.safetensors",
            )
        if self.to == "peft" and os.path.exists(output) and not os.path.isdir(output):
            yield ("output", "to"), f"{self.output!r} is a file, but an adapter is a folder; name a folder"


@command
def convert(options: ConvertOptions) -> int:
    """Take a prefix from PEFT, or give one to PEFT.

    For example:
        prefixtune convert runs/e2e/prefix.safetensors adapter --to peft
        prefixtune convert adapter prefix.safetensors --to prefixtune --backbone smollm2-135m
    """
    import torch

    from prefixtune.interop.peft import check_adapter_folder, export_peft
    from prefixtune.prefix.card import check_complete
    from prefixtune.prefix.prefix import save_prefix
    from prefixtune.utils.files import check_writable

    path, output = _find(options.input), Path(options.output)
    format_name = _detect_format(path)
    # Read now: a wrong file is reported before the model loads.
    prefix = _read(path, format_name, None)
    if options.to == "prefixtune":
        check_complete(prefix.header, output.parent)
    if options.to == "peft":
        check_adapter_folder(output)
    check_writable(output if options.to == "prefixtune" else output / "adapter_config.json")
    backbone = _load_backbone(options)
    if backbone is not None:
        prefix = _read(path, format_name, backbone)
    if options.to == "peft":
        export_peft(
            prefix, output, backbone, peft_type=options.peft_type or None, num_frozen_tokens=options.frozen_tokens
        )
    else:
        save_prefix(output, prefix, dtype=torch.bfloat16 if prefix.dtype == torch.bfloat16 else torch.float32)
    if options.as_json:
        print_json(
            {"from": format_name, "to": options.to, "input": options.input, "output": str(output), **_describe(prefix)}
        )
    else:
        print(f"{output}: {prefix!r}, from {format_name}")
    return 0


def _load_backbone(options: ConvertOptions) -> Backbone | None:
    """The backbone of --backbone."""
    if options.backbone is None:
        return None
    from prefixtune.backbone.load import load_backbone

    Console(quiet=options.quiet).info(f"loading {options.backbone} ...")
    return load_backbone(options.backbone, device="cpu")


def _describe(prefix: Prefix) -> dict[str, Any]:
    """The backbone and the size of a prefix, for --json."""
    from prefixtune.prefix.header import backbone_origin

    return {
        "backbone": backbone_origin(prefix.header).name or None,
        "prefix_length": prefix.lengths,
        "parameters": prefix.num_parameters,
    }


def _find(name: str) -> Path:
    """The file or the adapter's folder that the input names: of a run's folder or a repository, its prefix."""
    from prefixtune.prefix.hub import FILE, prefix_file, repository_of

    path = Path(name)
    is_run = os.path.isfile(path / FILE) and not os.path.isfile(path / "adapter_config.json")
    return prefix_file(name) if is_run or repository_of(name) is not None else path


def _detect_format(path: Path) -> str:
    """The format of a file or folder: `peft` or `prefixtune`."""
    from prefixtune.interop.peft import read_tensors

    if path.is_dir():
        if not (path / "adapter_config.json").is_file():
            raise CheckpointError(
                f"the folder {str(path)!r} holds no adapter_config.json and no prefix.safetensors.",
                hint="give the folder that PEFT's save_pretrained wrote, that of a finished training, or a file.",
            )
        return "peft"
    tensors, metadata = read_tensors(path)
    if "prefixtune" in metadata:
        return "prefixtune"
    hint = "give a prefix of `prefixtune train`, or a PEFT adapter's folder."
    if "prompt_embeddings" in tensors:
        hint = f"it is one of the two files of a PEFT adapter: give its folder, {str(path.parent)!r}."
    raise CheckpointError(f"{str(path)!r} is a safetensors file, but in no known format of prefixes.", hint=hint)


def _read(path: Path, format_name: str, backbone: Backbone | None) -> Prefix:
    from prefixtune.backbone.prefixes import load_prefix, make_header
    from prefixtune.interop.peft import import_peft
    from prefixtune.prefix.prefix import Prefix

    if format_name == "peft":
        return import_peft(path, backbone)
    prefix = load_prefix(path, backbone)
    return (
        prefix if backbone is None else Prefix(prefix.layers, {**prefix.header, **make_header(backbone)}, prefix.head)
    )
