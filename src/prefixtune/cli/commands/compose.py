"""`prefixtune compose`: one prefix file of several."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from prefixtune.cli.common import print_json
from prefixtune.cli.composing import find_rotation, part_rows, read_prefixes, save_composed
from prefixtune.cli.options import OutputOptions, command, json_option, positional
from prefixtune.errors import check_all
from prefixtune.utils.config import CommaList, TextList
from prefixtune.utils.console import Console

if TYPE_CHECKING:
    from prefixtune.prefix.prefix import Prefix
    from prefixtune.prefix.rotation import Rotation

__all__ = ["compose"]


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
    from prefixtune.prefix.compose import average, check_joinable, concatenate, interpolate
    from prefixtune.utils.files import check_writable

    console = Console(quiet=options.quiet)
    given = list(options.files)
    prefixes: list[Prefix] = []
    check_all([lambda: prefixes.extend(read_prefixes(given)), partial(check_writable, Path(options.output))])
    check_joinable(prefixes, given)
    rotation = None
    if options.mode == "concatenate":
        rotation = find_rotation(console, prefixes, given, options.backbone)
        composed = concatenate(prefixes, rotation, names=given)
    elif options.mode == "interpolate":
        composed = interpolate(prefixes, options.weights, names=given)
    else:
        composed = average(prefixes, names=given)
    size = save_composed(Path(options.output), composed)
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
    from prefixtune.prefix.composition import content_hash, same_templates
    from prefixtune.prefix.header import backbone_origin

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
