"""`prefixtune convert`, `push` and `export`: prefixes from and to other projects' formats, and the hub."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from prefixtune.cli.decoding import BackboneOptions
from prefixtune.cli.loading import load_trained, read_trained, short_name
from prefixtune.cli.options import PREFIX, Conflicts, OutputOptions, command, option
from prefixtune.utils.config import DTypeName

if TYPE_CHECKING:
    from prefixtune.backbone.backbone import Backbone
    from prefixtune.prefix.prefix import Prefix


class ConvertOptions(OutputOptions):
    """The options of `prefixtune convert`."""

    input: str = option(description=f"{PREFIX}; or the folder of a PEFT adapter", positional=True)
    output: str = option(description="a .safetensors file (prefixtune) or a folder (peft)", positional=True)
    to: Literal["peft", "prefixtune"] = option(description="the format to write")
    backbone: str | None = option(None, "check that it fits this model")
    peft_type: Literal["PREFIX_TUNING", "CARTRIDGE"] | None = option(
        None, "kind of PEFT adapter to write (default: what it came from, or else PREFIX_TUNING)"
    )

    def conflicts(self) -> Conflicts:
        """An option that does not go with the format to write."""
        if self.peft_type and self.to != "peft":
            yield ("peft_type", "to"), "--peft-type goes with --to peft only; leave it out"


@command
def convert(options: ConvertOptions) -> None:
    """Take a prefix from PEFT or the Hugging Face hub, or give one to PEFT.

    For example:
        prefixtune convert runs/e2e/prefix.safetensors adapter --to peft
        prefixtune convert adapter prefix.safetensors --to prefixtune --backbone smollm2-135m
        prefixtune convert hub:me/e2e-prefix@v2 prefix.safetensors --to prefixtune
    """
    from prefixtune.interop.peft import check_adapter_folder, export_peft
    from prefixtune.prefix.header import backbone_origin
    from prefixtune.prefix.hub import prefix_file
    from prefixtune.prefix.prefix import save_prefix

    path, output = Path(options.input), Path(options.output)
    if not (path / "adapter_config.json").is_file():
        path = prefix_file(options.input)
    # Read now: a wrong file is reported before the model loads.
    prefix = _read(path)
    if options.to == "peft":
        check_adapter_folder(output)
    backbone = None
    if options.backbone is not None:
        from prefixtune.backbone.load import load_backbone

        options.console.info(f"loading {options.backbone} ...")
        backbone = load_backbone(options.backbone, device="cpu")
        prefix = _read(path, backbone)
    if options.to == "peft":
        export_peft(prefix, output, backbone, peft_type=options.peft_type)
    else:
        save_prefix(output, prefix, dtype=prefix.dtype)
    facts = {
        "from": "peft" if path.is_dir() else "prefixtune",
        **{name: getattr(options, name) for name in ("to", "input", "output")},
        "backbone": backbone_origin(prefix.header).name or None,
        "prefix_length": prefix.lengths,
        "parameters": prefix.num_parameters,
    }
    options.show(facts, f"{output}: {prefix!r}, from {facts['from']}")


def _read(path: Path, backbone: Backbone | None = None) -> Prefix:
    from prefixtune.backbone.prefixes import load_prefix, make_header
    from prefixtune.interop.peft import import_peft
    from prefixtune.prefix.prefix import Prefix

    if path.is_dir():
        return import_peft(path, backbone)
    prefix = load_prefix(path, backbone)
    origin = {} if backbone is None else make_header(backbone)
    return Prefix(prefix.layers, {**prefix.header, **origin}, prefix.head)


class PushOptions(OutputOptions):
    """The options of `prefixtune push`."""

    file: str = option(description="a file of `prefixtune train`, or the folder of its run", positional=True)
    repo: str = option(description="repository, OWNER/NAME; made where there is none", positional=True)
    evaluation: str | None = option(None, "folder of `prefixtune evaluate`, whose scores are written into the card")
    public: bool = option(False, "let everybody see a new repository")
    message: str = option("", "of the commit")
    card: bool = option(False, "print the model card, and send nothing")
    revision: str | None = option(None, "branch that the repository has (default: the main branch)")

    def conflicts(self) -> Conflicts:
        """A card is no JSON."""
        yield from self.apart("card", "as_json")


@command
def push(options: PushOptions) -> None:
    """Upload a prefix to the Hugging Face hub, with a model card made from its header and scores.

    For example:
        prefixtune push runs/e2e/prefix.safetensors me/e2e-prefix --evaluation runs/e2e/evaluation
        prefixtune push runs/e2e/prefix.safetensors me/e2e-prefix --card
    """
    from prefixtune.backbone.prefixes import load_prefix

    prefix = load_prefix(options.file)
    if options.card:
        print(prefix.card(options.repo, options.evaluation), end="")
        return
    options.console.info(f"uploading {options.file} to {options.repo} ...")
    url = prefix.push_to_hub(
        options.repo,
        private=not options.public,
        evaluation=options.evaluation,
        commit_message=options.message,
        revision=options.revision,
    )
    options.show({"repo": options.repo, "url": url}, url)


class ExportOptions(BackboneOptions):
    """The options of `prefixtune export`."""

    prefix: str = option(description=PREFIX, positional=True)
    to: Literal["llama.cpp", "onnx"] = option(description="the runtime")
    output: str = option(description="folder for the exported files")
    kv_type: Literal["f16", "f32", "bf16"] = option("f16", "llama.cpp: type of the server's cache")
    dtype: DTypeName = option("float32", "of the loaded backbone; onnx: float32", group="backbone")
    device: str = option("cpu", "auto, cpu, cuda, cuda:0, mps", group="backbone")

    unused: ClassVar[Collection[str]] = ("quantize",)

    def conflicts(self) -> Conflicts:
        """An option of llama.cpp for another target."""
        if "kv_type" in self.model_fields_set and self.to != "llama.cpp":
            yield ("kv_type", "to"), f"--kv-type is for llama.cpp, but the target is {self.to}; leave it out"


@command
def export(options: ExportOptions) -> None:
    """Write a prefix for llama.cpp, or with its backbone as an ONNX graph.

    For example:
        prefixtune export runs/e2e/prefix.safetensors --to llama.cpp --output exported
        prefixtune export runs/e2e/prefix.safetensors --to onnx --output exported-onnx
    """
    from prefixtune.interop.export import check_folder, check_prefix
    from prefixtune.utils.files import check_writable

    if options.to == "onnx":
        from prefixtune.interop.onnx.export import export_onnx, require_onnx

        require_onnx()
    folder = Path(options.output)
    check_writable(folder / "any")
    check_folder(folder, options.to)
    trained = read_trained(options, [options.prefix])
    check_prefix(trained.prefixes[0], "ONNX" if options.to == "onnx" else options.to)
    backbone, (prefix,), _ = load_trained(options, trained)
    options.console.info(f"exporting to {options.to} ...")
    if options.to == "onnx":
        facts = export_onnx(prefix, backbone, folder)
        note = f"its logits are within {facts['max_difference']:.2g} of the backbone's"
    else:
        from prefixtune.interop.llama_cpp.export import export_llama_cpp

        # The name stands in the commands of the README and in requests.
        name = re.sub(r"[^\w.+-]+", "-", short_name(options.prefix)).lstrip("-.") or "prefix"
        facts = export_llama_cpp(prefix, backbone, folder, name=name, kv_type=options.kv_type)
        note = f"{folder / 'README.md'} says how to see in an answer that the prefix is in effect"
    options.show({**facts, "folder": str(folder)}, f"{folder / facts['file']}; {note}")
