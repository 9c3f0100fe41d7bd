"""`prefixtune compose`: one prefix file of several."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from prefixtune.cli.common import print_json
from prefixtune.cli.composing import find_rotation, load_backbone_of, part_rows, read_prefixes, save_composed
from prefixtune.cli.options import OutputOptions, command, json_option, positional
from prefixtune.errors import ConfigError, check_all
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
    mode: Literal["concatenate", "average", "interpolate", "difference"] = Field(
        "concatenate",
        description="concatenate: one after the other, each turned on by the lengths before it. average, interpolate: "
        "number by number, of one length. difference: the first without what the second learned from their start",
    )
    weights: CommaList[float] = Field(
        (),
        description="interpolate: one for each file, with sum 1; difference: how much is taken away (default: 1)",
    )
    start: str = Field(
        "",
        description="difference: the prefix that both were trained from; not needed where they started from the same "
        "words, which are run again",
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
        if self.start and self.mode != "difference":
            yield ("start", "mode"), "--start goes with --mode difference only; leave it out"
        if self.mode == "difference" and len(self.files) > 2:
            yield ("files", "mode"), f"--mode difference takes two files, but there are {len(self.files)}"
        wanted = {"interpolate": (len(self.files),), "difference": (0, 1)}.get(self.mode, (0,))
        if len(self.weights) not in wanted:
            allowed = "one for each file" if self.mode == "interpolate" else "one" if 1 in wanted else "none"
            yield ("weights", "mode"), f"--mode {self.mode} takes {allowed}, but --weights has {len(self.weights)}"
        elif self.mode == "interpolate" and not abs(sum(self.weights) - 1) <= 1e-6:
            yield ("weights",), f"the weights add up to {sum(self.weights):g}, but must to 1; divide each by their sum"


@command
def compose(options: ComposeOptions) -> int:
    """Make one prefix file of several: joined one after the other, averaged, or one without another.

    Joined, the first file stands first, and the text follows the last, whose text format and task the result has. The
    order matters in decoder-only models. How keys turn with position is read from the files; older ones do not say it,
    and then their backbone is loaded to find it.

    For example:
        prefixtune compose manual.safetensors style.safetensors --output both.safetensors
        prefixtune compose a.safetensors b.safetensors --mode interpolate --weights 0.7,0.3 --output mix.safetensors
        prefixtune compose a.safetensors b.safetensors --mode difference --start s.safetensors --output d.safetensors
    """
    from prefixtune.prefix.compose import average, check_joinable, concatenate, difference, interpolate
    from prefixtune.utils.files import check_writable

    console = Console(quiet=options.quiet)
    given = [*options.files, *([options.start] if options.start else [])]
    prefixes: list[Prefix] = []
    check_all([lambda: prefixes.extend(read_prefixes(given)), partial(check_writable, Path(options.output))])
    check_joinable(prefixes, given)
    rotation = None
    if options.mode == "concatenate":
        rotation = find_rotation(console, prefixes, given, options.backbone)
        composed = concatenate(prefixes, rotation, names=given)
    elif options.mode == "difference":
        start = prefixes[2] if options.start else _common_start(console, options, prefixes)
        weight = options.weights[0] if options.weights else 1.0
        names = [*options.files, options.start or "their start"]
        composed = difference(prefixes[0], prefixes[1], start, weight, names=names)
    elif options.mode == "interpolate":
        composed = interpolate(prefixes, options.weights, names=given)
    else:
        composed = average(prefixes, names=given)
    size = save_composed(Path(options.output), composed)
    notes = _notes(prefixes[: len(options.files)], options.files, rotation)
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


def _common_start(console: Console, options: ComposeOptions, prefixes: list[Prefix]) -> Prefix:
    """What two prefixes were trained from, where that is the same words: these are run again.

    Raises:
        ConfigError: They had no common start, or it was something else.
    """
    from prefixtune.prefix.compose import check_start
    from prefixtune.prefix.prefix import Prefix
    from prefixtune.training.starts.text import stored_text
    from prefixtune.training.starts.words import from_words

    check_start(prefixes, None, options.files)
    began = prefixes[0].header.get("initialization") or {}
    text = stored_text(began)
    if began.get("kind") != "words" or text is None or not prefixes[1].header.get("initialization"):
        raise ConfigError(
            f"--mode difference needs what both were trained from, which was {began.get('kind') or 'not stored'!r}.",
            hint="name it: --start FILE.",
        )
    backbone = load_backbone_of(console, prefixes, options.files, options.backbone)
    lengths = prefixes[0].lengths
    words = from_words(backbone, text, lengths)
    return Prefix(words.layers, {"backbone": prefixes[0].header.get("backbone")})


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
