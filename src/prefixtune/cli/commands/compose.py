"""`prefixtune compose` and `inspect`: one prefix of several, or fewer positions of one; what files hold."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prefixtune.cli.options import Conflicts, OutputOptions, PathText, command, option
from prefixtune.cli.show import Table, outline
from prefixtune.errors import CheckpointError, PrefixError
from prefixtune.utils.config import CommaList, TextList

if TYPE_CHECKING:
    from prefixtune.prefix.prefix import Prefix
    from prefixtune.prefix.rotation import Rotation
    from prefixtune.utils.console import Figure

_APPROXIMATE = (
    "the model adds positions to its input, so that keys cannot be moved: each part stays as it was computed, which is "
    "an approximation"
)


class ComposeOptions(OutputOptions):
    """The options of `prefixtune compose`."""

    files: TextList = option(
        (), "prefixes of one backbone, in order, named as for generate; one is cut", positional=True
    )
    output: str = option(description="the .safetensors file to write")
    mode: Literal["concatenate", "average", "interpolate"] = option(
        "concatenate",
        "one after the other (all right before the text if trained beside others); or number by number, of one length",
    )
    weights: CommaList[float] = option((), "interpolate: one for each file, with sum 1")
    length: int | None = option(None, "cut the result to so many positions, at every site that has more", ge=1)
    cut_from: Literal["start", "end"] = option(
        "end", "which end --length cuts off; at the start, the keys of what stays are turned back", flag="from"
    )
    backbone: str | None = option(None, "their backbone, if it is elsewhere now; it is run to find how keys turn")

    def conflicts(self) -> Conflicts:
        """Options that do not go together."""
        if len(self.files) < (1 if self.length else 2):
            yield ("files",), f"FILES names {len(self.files) or 'no'} prefix; name two or more, or cut one by --length"
        if len(self.files) == 1 and self.has("mode"):
            yield ("files", "mode"), f"--mode is {self.mode!r}, but FILES names 1 prefix"
        yield from self.only_with("length", "cut_from")
        if self.weights and self.mode != "interpolate":
            yield ("weights", "mode"), "--weights is for --mode interpolate; leave it out"


@command
def compose(options: ComposeOptions) -> None:
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
    from prefixtune.prefix.compose import average, check_joinable, concatenate, cut
    from prefixtune.prefix.prefix import Prefix, save_prefix
    from prefixtune.utils.machine import versions

    names, output = list(options.files), Path(options.output)
    prefixes = [load_prefix(file) for file in names]
    composed, rotation = prefixes[0], None
    if len(prefixes) > 1:
        check_joinable(prefixes, names)
    joins = options.mode == "concatenate" and len(names) > 1
    turns = joins or (options.length and options.cut_from == "start")
    if turns or options.backbone:
        found = _find_rotation(options, prefixes)
        rotation = found if turns else None
    if joins:
        composed = concatenate(prefixes, rotation, names=names)
    elif len(prefixes) > 1:
        composed = average(prefixes, options.weights if options.mode == "interpolate" else None, names=names)
    if options.length:
        composed = cut(composed, options.length, rotation, end=options.cut_from)
    header = {**composed.header, "made_with": versions()}
    save_prefix(output, Prefix(composed.layers, header, composed.head), dtype=composed.dtype)
    size = output.stat().st_size
    exact, notes = rotation is None or rotation.is_exact, list(_notes(prefixes, names))
    notes += [] if exact else [_APPROXIMATE]
    parts, mode = composed.header["composition"]["parts"], composed.header["composition"]["mode"]
    for note in notes:
        options.console.warn(note)
    facts = {"output": options.output, "mode": mode, "prefix_length": composed.lengths, "file_bytes": size}
    facts |= {"exact": exact, "parts": parts, "notes": notes}
    # A joined file that is joined again brings its own parts, in whatever form its writer gave them.
    rows = [[_cell(part.get(key)) for key in ("name", "prefix_length", "task", "dev_loss")] for part in parts]
    table = Table(mode, ["", "length", "task", "dev loss"], rows)
    options.show(facts, table, f"{options.output}: {composed!r}, {size:,} bytes")


def _cell(value: Any) -> Figure | None:
    """A fact of a header in a table; of lengths, each site's."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {one}" for name, one in value.items())
    return value if value is None or isinstance(value, float) else str(value)


def _notes(prefixes: Sequence[Prefix], names: Sequence[str]) -> Iterator[str]:
    """What a user should know of the result."""
    from prefixtune.prefix.compose import same_templates
    from prefixtune.prefix.header import backbone_origin

    formats = [one for prefix in prefixes if (one := prefix.header.get("text_format")) is not None]
    if not all(same_templates(one, formats[0]) for one in formats):
        yield "the parts have different text formats; the result has one of them (`prefixtune inspect` shows it)"
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
    from prefixtune.backbone.prefixes import load_prefix, named_backbone
    from prefixtune.prefix.compose import stored_rotation

    stored = None if options.backbone else stored_rotation(prefixes)
    if stored:
        return stored
    name = options.backbone or named_backbone(prefixes)
    options.console.info(f"loading {name} ...")
    loaded = load_backbone(name, device="cpu")
    for prefix in prefixes:
        load_prefix(prefix, loaded)
    return loaded.rotation


class InspectOptions(OutputOptions):
    """The options of `prefixtune inspect`."""

    path: PathText = option(
        description="a prefix; or a folder, whose prefixes and runs are listed (exit code 1: some are broken)",
        positional=True,
    )


@command
def inspect(options: InspectOptions) -> int:
    """Show a prefix file: header, sizes, norms per layer; or list a folder."""
    from prefixtune.prefix.hub import prefix_file

    if os.path.isdir(options.path):  # Path.is_dir raises if the parent folder may not be read
        return _list(options, Path(options.path))
    path = prefix_file(options.path)

    from prefixtune.backbone.prefixes import load_prefix

    prefix = load_prefix(path)
    norms = [
        {"site": site, "layer": index}
        | {f"{name}_norm": round(float(one.float().norm(dim=-1).mean()), 4) for name, one in (("key", k), ("value", v))}
        for site, layers in prefix.layers.items()
        for index, (k, v) in enumerate(layers)
    ]
    sizes: dict[str, Any] = {"file_bytes": path.stat().st_size, "tensor_bytes": prefix.num_bytes}
    sizes |= {"parameters": prefix.num_parameters, "prefix_length": prefix.lengths}
    options.show(
        {"file": str(path), **sizes, "header": prefix.header, "layers": norms},
        f"{path}: {prefix!r}, {sizes['file_bytes']:,} bytes",
        *outline(prefix.header),
        Table("mean norm of a head's vector", ["site", "layer", "key", "value"], [[*row.values()] for row in norms]),
    )
    return 0


def _list(options: InspectOptions, folder: Path) -> int:
    """List the prefixes of a folder and the runs in it; returns 1 if a file is broken."""
    rows = [_row(folder, path) for path in _artifacts(folder)]
    if not rows:
        raise CheckpointError(
            f"{str(folder)!r} holds no prefix and no finished run.",
            hint="give a .safetensors file of `prefixtune train`, a folder of such files, or the --output of a run.",
        )
    names = {"name": "name", "file_bytes": "bytes", "method": "method", "backbone": "backbone", "task": "task"}
    good = [[*(row[name] for name in names), _cell(row["prefix_length"])] for row in rows if "error" not in row]
    broken = [[row["name"], row["error"]] for row in rows if "error" in row]
    options.show(
        {"folder": str(folder), "prefixes": rows},
        Table(f"{len(good)} of {len(rows)} files in {folder}", [*names.values(), "length"], good),
        *([Table("broken files", ["name", "why"], broken)] if broken else []),
    )
    return 1 if broken else 0


def _artifacts(folder: Path) -> list[Path]:
    """The files NAME.safetensors of a folder, and what each run in it trained, in order of their names."""
    from prefixtune.distillation.teacher import LABELS_FILE
    from prefixtune.prefix.folder import ENDING, list_names, path_of
    from prefixtune.prefix.hub import FILE
    from prefixtune.training.run_folder import STATE_FILE, WEIGHTS_FILE

    others = {name.removesuffix(ENDING) for name in (STATE_FILE, LABELS_FILE)}
    here = [path_of(folder, name) for name in list_names(folder) - others]
    return sorted([*here, *(path for name in (FILE, WEIGHTS_FILE) for path in folder.glob(f"*/{name}"))])


def _row(folder: Path, path: Path) -> dict[str, Any]:
    """The row of a file in the list; the whole file is read and checked, as when it is used."""
    from prefixtune.backbone.prefixes import load_prefix
    from prefixtune.prefix.header import backbone_origin
    from prefixtune.training.artifact import load_weights
    from prefixtune.training.run_folder import WEIGHTS_FILE

    header: Mapping[str, Any]
    row: dict[str, Any] = {"name": str(path.relative_to(folder)), "file": str(path)}
    try:
        row["file_bytes"] = path.stat().st_size
        if path.name == WEIGHTS_FILE:
            tensors, header = load_weights(path)
            row |= {"parameters": sum(tensor.numel() for tensor in tensors.values()), "prefix_length": {}}
        else:
            prefix = load_prefix(path)
            header = prefix.header
            row |= {"parameters": prefix.num_parameters, "prefix_length": prefix.lengths}
    except (PrefixError, OSError) as error:
        return {**row, "error": str(error)}
    row |= {"method": header.get("method", "prefix"), "backbone": backbone_origin(header).name or None}
    return {**row, "task": header.get("task")}
