"""`prefixtune convert`: prefixes from and to other projects' formats."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from prefixtune.cli.options import OutputOptions, command, json_option, positional
from prefixtune.cli.show import show
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
        for name in ("peft_type", "frozen_tokens") if self.to != "peft" else ():
            if getattr(self, name) != self.default(name):
                yield (name, "to"), f"{self.flag(name)} goes with --to peft only; leave it out"
        if self.to == "prefixtune" and Path(self.output).suffix != ".safetensors":
            name = Path(self.output).stem or "prefix"
            yield ("output", "to"), f"{self.output!r} does not end with .safetensors; write to {name}.safetensors"


@command
def convert(options: ConvertOptions) -> int:
    """Take a prefix from PEFT or the Hugging Face hub, or give one to PEFT.

    For example:
        prefixtune convert runs/e2e/prefix.safetensors adapter --to peft
        prefixtune convert adapter prefix.safetensors --to prefixtune --backbone smollm2-135m
        prefixtune convert hub:me/e2e-prefix@v2 prefix.safetensors --to prefixtune
    """
    import torch

    from prefixtune.interop.peft import check_adapter_folder, export_peft
    from prefixtune.prefix.card import check_complete
    from prefixtune.prefix.header import backbone_origin
    from prefixtune.prefix.prefix import save_prefix

    path, output = _find(options.input), Path(options.output)
    # Read now: a wrong file is reported before the model loads.
    prefix = _read(path)
    if options.to == "peft":
        check_adapter_folder(output)
    else:
        check_complete(prefix.header, output.parent)
    backbone = None
    if options.backbone is not None:
        from prefixtune.backbone.load import load_backbone

        Console(quiet=options.quiet).info(f"loading {options.backbone} ...")
        backbone = load_backbone(options.backbone, device="cpu")
        prefix = _read(path, backbone)
    if options.to == "peft":
        export_peft(
            prefix, output, backbone, peft_type=options.peft_type or None, num_frozen_tokens=options.frozen_tokens
        )
    else:
        save_prefix(output, prefix, dtype=torch.bfloat16 if prefix.dtype == torch.bfloat16 else torch.float32)
    facts = {
        "from": "peft" if path.is_dir() else "prefixtune",
        "to": options.to,
        "input": options.input,
        "output": str(output),
        "backbone": backbone_origin(prefix.header).name or None,
        "prefix_length": prefix.lengths,
        "parameters": prefix.num_parameters,
    }
    show(facts, f"{output}: {prefix!r}, from {facts['from']}", as_json=options.as_json)
    return 0


def _find(name: str) -> Path:
    """The file or the adapter's folder that the input names: of a run's folder or a repository, its prefix."""
    from prefixtune.prefix.hub import FILE, prefix_file, repository_of

    path = Path(name)
    is_run = os.path.isfile(path / FILE) and not os.path.isfile(path / "adapter_config.json")
    return prefix_file(name) if is_run or repository_of(name) is not None else path


def _read(path: Path, backbone: Backbone | None = None) -> Prefix:
    from prefixtune.backbone.prefixes import load_prefix, make_header
    from prefixtune.interop.peft import import_peft
    from prefixtune.prefix.prefix import Prefix

    if path.is_dir():
        return import_peft(path, backbone)
    prefix = load_prefix(path, backbone)
    return (
        prefix if backbone is None else Prefix(prefix.layers, {**prefix.header, **make_header(backbone)}, prefix.head)
    )
