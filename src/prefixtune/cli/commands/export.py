"""`prefixtune export`: a prefix for llama.cpp, or with its backbone as an ONNX graph."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from prefixtune.cli.decoding import BackboneOptions
from prefixtune.cli.loading import load_with_prefixes, short_name
from prefixtune.cli.options import OutputOptions, command, json_option, positional
from prefixtune.cli.show import show
from prefixtune.utils.config import DTypeName, option_group
from prefixtune.utils.console import Console
from prefixtune.utils.files import check_writable

__all__ = ["export"]


_of_llama_cpp, _of_backbone = option_group("llama.cpp"), option_group("backbone")


class ExportOptions(BackboneOptions, OutputOptions):
    """The options of `prefixtune export`."""

    prefix: str = positional(
        description="a .safetensors file of `prefixtune train`, the folder of its run, or hub:OWNER/NAME"
    )
    to: Literal["llama.cpp", "onnx"] = Field(description="the runtime")
    output: str = Field(description="folder for the exported files")
    state_version: int = _of_llama_cpp(
        4, ge=2, le=4, description="layout of the state file; it depends on the build of llama.cpp"
    )
    kv_type: Literal["f16", "f32", "bf16"] = _of_llama_cpp("f16", description="type of the server's cache")
    dtype: DTypeName = _of_backbone("float32", description="of the loaded backbone; onnx: float32")
    device: str = _of_backbone("cpu", description="auto, cpu, cuda, cuda:0, mps")
    as_json: bool = json_option("the contents of export.json")

    unused: ClassVar[Collection[str]] = ("quantize",)

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Options of llama.cpp for another target."""
        for name in ("state_version", "kv_type") if self.to != "llama.cpp" else ():
            if name in self.model_fields_set:
                yield (name, "to"), f"{self.flag(name)} is for llama.cpp, but the target is {self.to}; leave it out"


@command
def export(options: ExportOptions) -> int:
    """Write a prefix for llama.cpp, or with its backbone as an ONNX graph.

    For example:
        prefixtune export runs/e2e/prefix.safetensors --to llama.cpp --output exported
        prefixtune export runs/e2e/prefix.safetensors --to onnx --output exported
    """
    from prefixtune.interop.export import check_folder, check_prefix

    if options.to == "onnx":
        from prefixtune.interop.onnx.export import export_onnx, require_onnx

        require_onnx()
    folder, console = Path(options.output), Console(quiet=options.quiet)
    target = "ONNX" if options.to == "onnx" else options.to
    check_writable(folder / "any")
    check_folder(folder)
    backbone, (prefix,) = load_with_prefixes(
        console, options, [options.prefix], lambda prefixes: check_prefix(prefixes[0], target)
    )
    console.info(f"exporting to {options.to} ...")
    if options.to == "onnx":
        facts = export_onnx(prefix, backbone, folder)
        note = f"its logits are within {facts['max_difference']:.2g} of the backbone's"
    else:
        from prefixtune.interop.llama_cpp.export import export_llama_cpp

        # The name stands in the commands of the README and in requests.
        name = re.sub(r"[^A-Za-z0-9._+-]+", "-", short_name(options.prefix))
        facts = export_llama_cpp(
            prefix, backbone, folder, name=name, state_version=options.state_version, kv_type=options.kv_type
        )
        note = f"run {folder / 'check.py'} against the server, which also answers if the prefix is not loaded"
    show({**facts, "folder": str(folder)}, f"{folder / facts['file']}; {note}", as_json=options.as_json)
    return 0
