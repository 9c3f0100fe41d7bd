"""`prefixtune compose` and `cut`: one prefix of several, and fewer positions of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from prefixtune.cli.common import print_json
from prefixtune.cli.options import OutputOptions, command, json_option, positional
from prefixtune.errors import ConfigError
from prefixtune.utils.config import CommaList, TextList
from prefixtune.utils.console import Console
from prefixtune.utils.files import check_writable

if TYPE_CHECKING:
    from prefixtune.prefix.prefix import Prefix
    from prefixtune.prefix.rotation import Rotation

__all__ = ["compose", "cut", "part_rows"]


class ComposeOptions(OutputOptions):
    """The options of `prefixtune compose`."""

    files: TextList = positional(
        (),
        description="two or more prefixes of one backbone, in order: files, folders of runs, or hub:OWNER/NAME",
    )
    output: str = Field(description="the .safetensors file to write")
    mode: Literal["concatenate", "average", "interpolate"] = Field(
        "concatenate",
        description="concatenate: one after the other, each turned on by the lengths before it. average, interpolate: "
        "number by number, of one length",
    )
    weights: CommaList[float] = Field(
        (),
        description="interpolate: one for each file, with sum 1",
    )
    backbone: str | None = Field(
        None, description="their backbone, if it is elsewhere now; how keys turn is then found by running it"
    )
    as_json: bool = json_option("what was done")

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Options that do not go with the mode."""
        if Path(self.output).suffix != ".safetensors":
            name = Path(self.output).stem or "prefix"
            yield ("output",), f"{self.output!r} does not end with .safetensors; write to {name}.safetensors"
        if len(self.files) < 2:
            yield ("files",), f"FILES names {len(self.files) or 'no'} prefix; name two or more"
        if self.backbone is not None and self.mode in ("average", "interpolate"):
            yield ("backbone", "mode"), f"--mode {self.mode} turns no keys and needs no --backbone; leave it out"
        wanted = len(self.files) if self.mode == "interpolate" else 0
        if len(self.weights) != wanted:
            allowed = "one for each file" if wanted else "none"
            yield ("weights", "mode"), f"--mode {self.mode} takes {allowed}, but --weights has {len(self.weights)}"
        elif self.mode == "interpolate" and not abs(sum(self.weights) - 1) <= 1e-6:
            yield ("weights",), f"the weights add up to {sum(self.weights):g}, but must to 1; divide each by their sum"


@command
def compose(options: ComposeOptions) -> int:
    """Make one prefix file of several: joined one after the other, or averaged.

    Joined, the first file stands first, and the text follows the last, whose text format and task the result has. The
    order matters in decoder-only models. How keys turn with position is read from the files; older ones do not say it,
    and then their backbone is loaded to find it.

    For example:
        prefixtune compose manual.safetensors style.safetensors --output both.safetensors
        prefixtune compose a.safetensors b.safetensors --mode interpolate --weights 0.7,0.3 --output mix.safetensors
    """
    from prefixtune.backbone.prefixes import load_prefix
    from prefixtune.prefix.compose import average, check_joinable, concatenate

    console = Console(quiet=options.quiet)
    given = list(options.files)
    prefixes = [load_prefix(file) for file in given]
    check_writable(Path(options.output))
    check_joinable(prefixes, given)
    rotation = None
    if options.mode == "concatenate":
        rotation = _find_rotation(console, prefixes, given, options.backbone)
        composed = concatenate(prefixes, rotation, names=given)
    elif options.mode == "interpolate":
        composed = average(prefixes, options.weights, names=given)
    else:
        composed = average(prefixes, names=given)
    size = _save(Path(options.output), composed)
    notes = _notes(prefixes, options.files, rotation)
    parts = composed.header["composition"]["parts"]
    if options.as_json:
        lengths = composed.lengths
        print_json(
            {"output": options.output, "mode": options.mode, "prefix_length": lengths, "file_bytes": size}
            | {"parts": parts, "notes": notes}
        )
        return 0
    for note in notes:
        console.warn(note)
    console.table(f"parts, by {options.mode}", *part_rows(parts), result=True)
    print(f"{options.output}: {composed!r}, {size:,} bytes")
    return 0


def _notes(prefixes: list[Prefix], names: tuple[str, ...], rotation: Rotation | None) -> list[str]:
    """What a user should know of the result."""
    from prefixtune.prefix.compose import same_templates
    from prefixtune.prefix.header import backbone_origin
    from prefixtune.prefix.prefix import content_hash

    notes = []
    first_of: dict[str, str] = {}
    for name, prefix in zip(names, prefixes, strict=True):
        first = first_of.setdefault(content_hash(prefix), name)
        if first is not name:
            notes.append(f"{name} has the content of {first}, which counts twice")
    if rotation is not None and not rotation.is_exact:
        notes.append(
            "the model adds positions to its input, so that keys cannot be moved: each part stays as it was computed, "
            "which is an approximation"
        )
    formats = [prefix.header.get("text_format") for prefix in prefixes]
    known = [one for one in formats if one is not None]
    if not all(same_templates(one, known[0]) for one in known):
        notes.append(
            "the parts have different text formats; the result has one of them (`prefixtune inspect` shows it)"
        )
    dtypes = {str((prefix.header.get("training") or {}).get("backbone_dtype") or "") for prefix in prefixes} - {""}
    if len(dtypes) > 1:
        notes.append(f"the parts were trained on the backbone in different dtypes ({', '.join(sorted(dtypes))})")
    unnamed = [
        name for name, prefix in zip(names, prefixes, strict=True) if not backbone_origin(prefix.header).fingerprint
    ]
    if unnamed:
        notes.append(f"no backbone is named in {', '.join(unnamed)}: only shapes were compared")
    return notes


class CutOptions(OutputOptions):
    """The options of `prefixtune cut`."""

    file: str = positional(description="a prefix: a file, the folder of a run, or hub:OWNER/NAME")
    length: int = Field(ge=1, description="how many positions stay, at every site that has more")
    cut_from: Literal["start", "end"] = Field(
        "end",
        description="which end is cut off. end: the first positions stay, exactly as they are. start: the last ones "
        "stay, and their keys are turned back",
        json_schema_extra={"flag": "from"},
    )
    output: str = Field(description="the .safetensors file to write")
    backbone: str | None = Field(
        None, description="its backbone, for --from start: how keys turn is then found by running it"
    )
    as_json: bool = json_option("what was done")

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """An output that is no prefix file, and a backbone that is not needed."""
        if Path(self.output).suffix != ".safetensors":
            name = Path(self.output).stem or "prefix"
            yield ("output",), f"{self.output!r} does not end with .safetensors; write to {name}.safetensors"
        if self.backbone is not None and self.cut_from == "end":
            yield ("backbone", "cut_from"), "--from end turns no keys and needs no --backbone; leave it out"


@command
def cut(options: CutOptions) -> int:
    """Cut a prefix to fewer positions.

    Cut from the end, what stays is exact: positions do not depend on those behind them. Cut from the start, positions
    are moved back exactly in rotary models, and where keys have no position; models that add positions to their input
    (GPT-2, OPT) keep them as they were. Either way, what the rest has taken over from the positions before it stays.

    For example:
        prefixtune cut runs/e2e --length 5 --output short.safetensors
    """
    from prefixtune.backbone.prefixes import load_prefix
    from prefixtune.prefix.card import check_complete
    from prefixtune.prefix.compose import cut as cut_prefix

    console = Console(quiet=options.quiet)
    prefix = load_prefix(options.file)
    check_complete(prefix.header, Path(options.output).parent)
    check_writable(Path(options.output))
    rotation = None
    if options.cut_from == "start" and options.length < prefix.prefix_length:
        rotation = _find_rotation(console, [prefix], [options.file], options.backbone)
    shorter = cut_prefix(prefix, options.length, rotation, end=options.cut_from)
    exact = rotation is None or rotation.is_exact
    size = _save(Path(options.output), shorter)
    if options.as_json:
        lengths = shorter.lengths
        print_json(
            {"output": options.output, "from": options.cut_from, "prefix_length": lengths, "exact": exact}
            | {"file_bytes": size}
        )
        return 0
    if not exact:
        console.warn(
            "the model adds positions to its input, so that the rest could not be moved back: an approximation"
        )
    print(f"{options.output}: {shorter!r}, {size:,} bytes")
    return 0


def _find_rotation(
    console: Console, prefixes: Sequence[Prefix], files: Sequence[str], backbone: str | None
) -> Rotation:
    """How keys turn with position: as the headers have it, or found by running the backbone that is given or named.

    Raises:
        PrefixError: No backbone is named, it cannot be loaded, or its keys cannot be moved.
    """
    from prefixtune.backbone.load import load_backbone
    from prefixtune.backbone.prefixes import load_prefix
    from prefixtune.prefix.compose import stored_rotation
    from prefixtune.prefix.header import backbone_origin

    stored = None if backbone else stored_rotation(prefixes, files)
    if stored:
        return stored
    name = backbone or next((origin for one in prefixes if (origin := backbone_origin(one.header).name)), "")
    if not name:
        raise ConfigError(f"{files[0]!r} does not name its backbone.", hint="name it: --backbone NAME.")
    console.info(f"loading {name} ...")
    loaded = load_backbone(name, device="cpu")
    for prefix in prefixes:
        load_prefix(prefix, loaded)
    return loaded.rotation


def _save(path: Path, prefix: Prefix) -> int:
    """Store a prefix in its own dtype; returns the file's size in bytes."""
    import platform

    import torch

    from prefixtune import __version__
    from prefixtune.prefix.prefix import Prefix, save_prefix

    versions = {"prefixtune": __version__, "torch": torch.__version__, "python": platform.python_version()}
    dtype = prefix.dtype if prefix.dtype in (torch.bfloat16, torch.float16) else torch.float32
    save_prefix(path, Prefix(prefix.layers, {**prefix.header, "made_with": versions}, prefix.head), dtype=dtype)
    return path.stat().st_size


def part_rows(parts: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str | int | float]]]:
    """Columns and rows of a table of a composed prefix's parts."""
    from prefixtune.prefix.compose import MAX_PARTS

    known = ("name", "prefix_length", "weight", "task", "dev_loss", "hash")
    columns = [name for name in known if any(part.get(name) is not None for part in parts)]
    return columns, [[_cell(part.get(name, "")) for name in columns] for part in parts[:MAX_PARTS]]


def _cell(value: object) -> str | int | float:
    """A value of a header, which may come from anybody, for a cell of a table."""
    if isinstance(value, int | float):
        return value
    text = ", ".join(f"{site} {n}" for site, n in value.items()) if isinstance(value, Mapping) else str(value or "")
    return text if len(text) <= 60 else f"{text[:57]}..."
