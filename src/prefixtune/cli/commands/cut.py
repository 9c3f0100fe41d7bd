"""`prefixtune cut`: some of a prefix's positions, as a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from prefixtune.cli.common import print_json
from prefixtune.cli.composing import find_rotation, read_prefixes, save_composed
from prefixtune.cli.options import OutputOptions, command, json_option, positional
from prefixtune.utils.console import Console

__all__ = ["cut"]


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
    from prefixtune.prefix.card import check_complete
    from prefixtune.prefix.compose import cut as cut_prefix
    from prefixtune.utils.files import check_writable

    console = Console(quiet=options.quiet)
    (prefix,) = read_prefixes([options.file])
    check_complete(prefix, Path(options.output).parent)
    check_writable(Path(options.output))
    rotation = None
    if options.cut_from == "start" and options.length < prefix.prefix_length:
        rotation = find_rotation(console, [prefix], [options.file], options.backbone)
    shorter = cut_prefix(prefix, options.length, rotation, end=options.cut_from)
    exact = rotation is None or rotation.is_exact
    size = save_composed(Path(options.output), shorter)
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
