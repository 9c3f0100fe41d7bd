"""`prefixtune compose`: one prefix of several, or fewer positions of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from prefixtune.cli.options import OutputOptions, command, json_option, positional
from prefixtune.cli.show import Table, show
from prefixtune.errors import ConfigError
from prefixtune.utils.config import CommaList, TextList
from prefixtune.utils.console import Console

if TYPE_CHECKING:
    from prefixtune.prefix.prefix import Prefix
    from prefixtune.prefix.rotation import Rotation

__all__ = ["compose", "parts_table"]

_APPROXIMATE = (
    "the model adds positions to its input, so that keys cannot be moved: each part stays as it was computed, which is "
    "an approximation"
)


class ComposeOptions(OutputOptions):
    """The options of `prefixtune compose`."""

    files: TextList = positional(
        (),
        description="prefixes of one backbone, in order: files, folders of runs, or hub:OWNER/NAME; one alone is cut",
    )
    output: str = Field(description="the .safetensors file to write")
    mode: Literal["concatenate", "average", "interpolate"] = Field(
        "concatenate",
        description="concatenate: one after the other, each turned on by the lengths before it. average, interpolate: "
        "number by number, of one length",
    )
    weights: CommaList[float] = Field((), description="interpolate: one for each file, with sum 1")
    length: int | None = Field(
        None, ge=1, description="cut the result to so many positions, at every site that has more"
    )
    cut_from: Literal["start", "end"] = Field(
        "end",
        description="with --length: which end is cut off. end: the first positions stay, exactly as they are. start: "
        "the last ones stay, and their keys are turned back",
        json_schema_extra={"flag": "from"},
    )
    backbone: str | None = Field(
        None, description="their backbone, if it is elsewhere now; how keys turn is then found by running it"
    )
    as_json: bool = json_option("what was done")

    @property
    def turns_keys(self) -> bool:
        """Whether positions are moved."""
        joins = self.mode == "concatenate" and len(self.files) > 1
        return joins or (bool(self.length) and self.cut_from == "start")

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Options that do not go together."""
        if Path(self.output).suffix != ".safetensors":
            name = Path(self.output).stem or "prefix"
            yield ("output",), f"{self.output!r} does not end with .safetensors; write to {name}.safetensors"
        if len(self.files) < (1 if self.length else 2):
            yield ("files",), f"FILES names {len(self.files) or 'no'} prefix; name two or more, or cut one by --length"
        if self.weights and self.mode != "interpolate":
            yield ("weights", "mode"), "--weights is for --mode interpolate; leave it out"
        if self.backbone is not None and not self.turns_keys:
            yield ("backbone", "mode"), "--backbone is needed where keys are turned, and none are; leave it out"


@command
def compose(options: ComposeOptions) -> int:
    """Make one prefix file of several: joined one after the other, or averaged; or cut one to fewer positions.

    Joined, the first file stands first, and the text follows the last, whose text format and task the result has. The
    order matters in decoder-only models. How keys turn with position is read from the files; older ones do not say it,
    and then their backbone is loaded to find it.

    Cut from the end, what stays is exact: positions do not depend on those behind them. Cut from the start, positions
    are moved back exactly in rotary models, and where keys have no position; models that add positions to their input
    (GPT-2, OPT) keep them as they were. Either way, what the rest has taken over from the positions before it stays.

    For example:
        prefixtune compose manual.safetensors style.safetensors --output both.safetensors
        prefixtune compose a.safetensors b.safetensors --mode interpolate --weights 0.7,0.3 --output mix.safetensors
        prefixtune compose runs/e2e --length 5 --output short.safetensors
    """
    from prefixtune.backbone.prefixes import load_prefix
    from prefixtune.prefix.card import check_complete
    from prefixtune.prefix.compose import average, check_joinable, concatenate, cut

    names, output = list(options.files), Path(options.output)
    prefixes = [load_prefix(file) for file in names]
    if len(prefixes) > 1:
        check_joinable(prefixes, names)
    rotation = _find_rotation(options, prefixes) if options.turns_keys else None
    if len(prefixes) == 1:
        composed = prefixes[0]
    elif options.mode == "concatenate":
        composed = concatenate(prefixes, rotation, names=names)
    else:
        composed = average(prefixes, options.weights if options.mode == "interpolate" else None, names=names)
    if options.length:
        composed = cut(composed, options.length, rotation, end=options.cut_from)
    check_complete(composed.header, output.parent)
    size = _save(output, composed)
    exact, notes = rotation is None or rotation.is_exact, list(_notes(prefixes, names))
    notes += [] if exact else [_APPROXIMATE]
    parts, mode = composed.header["composition"]["parts"], composed.header["composition"]["mode"]
    for note in notes:
        Console(quiet=options.quiet).warn(note)
    show(
        {"output": options.output, "mode": mode, "prefix_length": composed.lengths, "file_bytes": size}
        | {"exact": exact, "parts": parts, "notes": notes},
        parts_table(mode, parts),
        f"{options.output}: {composed!r}, {size:,} bytes",
        as_json=options.as_json,
    )
    return 0


def _notes(prefixes: Sequence[Prefix], names: Sequence[str]) -> Iterator[str]:
    """What a user should know of the result."""
    from prefixtune.prefix.compose import same_templates
    from prefixtune.prefix.header import backbone_origin
    from prefixtune.prefix.prefix import content_hash

    first_of: dict[str, str] = {}
    for name, prefix in zip(names, prefixes, strict=True):
        first = first_of.setdefault(content_hash(prefix), name)
        if first is not name:
            yield f"{name} has the content of {first}, which counts twice"
    formats = [one for prefix in prefixes if (one := prefix.header.get("text_format")) is not None]
    if not all(same_templates(one, formats[0]) for one in formats):
        yield "the parts have different text formats; the result has one of them (`prefixtune inspect` shows it)"
    dtypes = {str((prefix.header.get("training") or {}).get("backbone_dtype") or "") for prefix in prefixes} - {""}
    if len(dtypes) > 1:
        yield f"the parts were trained on the backbone in different dtypes ({', '.join(sorted(dtypes))})"
    unnamed = [
        name for name, prefix in zip(names, prefixes, strict=True) if not backbone_origin(prefix.header).fingerprint
    ]
    if unnamed and len(names) > 1:
        yield f"no backbone is named in {', '.join(unnamed)}: only shapes were compared"


def _find_rotation(options: ComposeOptions, prefixes: Sequence[Prefix]) -> Rotation:
    """How keys turn with position: as the headers have it, or found by running the backbone that is given or named.

    Raises:
        PrefixError: No backbone is named, it cannot be loaded, or its keys cannot be moved.
    """
    from prefixtune.backbone.load import load_backbone
    from prefixtune.backbone.prefixes import load_prefix
    from prefixtune.prefix.compose import stored_rotation
    from prefixtune.prefix.header import backbone_origin

    stored = None if options.backbone else stored_rotation(prefixes, options.files)
    if stored:
        return stored
    name = options.backbone or next((origin for one in prefixes if (origin := backbone_origin(one.header).name)), "")
    if not name:
        raise ConfigError(f"{options.files[0]!r} does not name its backbone.", hint="name it: --backbone NAME.")
    Console(quiet=options.quiet).info(f"loading {name} ...")
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


def parts_table(mode: object, parts: Sequence[Mapping[str, Any]]) -> Table:
    """The parts of a composed prefix, whose header may come from anybody."""
    from prefixtune.prefix.compose import MAX_PARTS

    known = ("name", "prefix_length", "weight", "task", "dev_loss", "hash")
    columns = [name for name in known if any(part.get(name) is not None for part in parts)]
    rows = [[_cell(part.get(name, "")) for name in columns] for part in parts[:MAX_PARTS]]
    return Table(f"parts, by {str(mode)[:20]}", columns, rows)


def _cell(value: object) -> str | int | float:
    if isinstance(value, int | float):
        return value
    text = ", ".join(f"{site} {n}" for site, n in value.items()) if isinstance(value, Mapping) else str(value or "")
    return text if len(text) <= 60 else f"{text[:57]}..."
