"""`prefixtune inspect`: show a prefix file, or list the prefixes of a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prefixtune.cli.commands.compose import parts_table
from prefixtune.cli.options import OutputOptions, PathText, command, json_option, positional
from prefixtune.cli.show import Table, show
from prefixtune.errors import CheckpointError, PrefixError

__all__ = ["inspect"]


class InspectOptions(OutputOptions):
    """The options of `prefixtune inspect`."""

    path: PathText = positional(
        description="a .safetensors file of `prefixtune train`; or a folder: its prefixes and the runs in it, of any "
        "method, are listed, broken ones with the reason (exit code 1)"
    )
    as_json: bool = json_option("all of it")


@command
def inspect(options: InspectOptions) -> int:
    """Show a prefix file: header, sizes, norms per layer; or list a folder."""
    from prefixtune.prefix.hub import prefix_file

    if os.path.isdir(options.path):  # Path.is_dir raises if the parent folder may not be read
        return _list(Path(options.path), options.as_json)
    path = prefix_file(options.path)

    from prefixtune.backbone.prefixes import load_prefix

    prefix = load_prefix(path)
    norms = [
        {
            "site": site,
            "layer": index,
            "key_norm": round(float(key.float().norm(dim=-1).mean()), 4),
            "value_norm": round(float(value.float().norm(dim=-1).mean()), 4),
        }
        for site, layers in prefix.layers.items()
        for index, (key, value) in enumerate(layers)
    ]
    sizes = {
        "file_bytes": path.stat().st_size,
        "tensor_bytes": prefix.num_bytes,
        "parameters": prefix.num_parameters,
        "prefix_length": prefix.lengths,
    }
    composition = prefix.header.get("composition") or {}
    parts = composition.get("parts") or []
    has_parts = isinstance(parts, list) and all(isinstance(part, Mapping) for part in parts) and bool(parts)
    show(
        {"file": str(path), **sizes, "header": prefix.header, "layers": norms},
        f"{path}: {prefix!r}, {sizes['file_bytes']:,} bytes",
        Table("header", ["key", "value"], list(_flatten({**prefix.header, "composition": {}}))),
        *([parts_table(composition.get("mode"), parts)] if has_parts else []),
        Table(
            "mean norm of a head's vector",
            ["site", "layer", "key", "value"],
            [[str(n["site"]), str(n["layer"]), f"{n['key_norm']:.3f}", f"{n['value_norm']:.3f}"] for n in norms],
        ),
        as_json=options.as_json,
    )
    return 0


def _list(folder: Path, as_json: bool) -> int:
    """List the prefixes of a folder and the runs in it; returns 1 if a file is broken."""
    rows = [_row(folder, path) for path in _artifacts(folder)]
    if not rows:
        raise CheckpointError(
            f"{str(folder)!r} holds no prefix and no finished run.",
            hint="give a .safetensors file of `prefixtune train`, a folder of such files, or the --output of a run.",
        )
    good = [
        [row["name"], row["file_bytes"], row["method"], row["backbone"], _length(row["prefix_length"]), row["task"]]
        for row in rows
        if "error" not in row
    ]
    broken = [[row["name"], row["error"]] for row in rows if "error" in row]
    columns = ["name", "bytes", "method", "backbone", "length", "task"]
    show(
        {"folder": str(folder), "prefixes": rows},
        Table(f"{len(good)} of {len(rows)} files in {folder}", columns, good),
        *([Table("broken files", ["name", "why"], broken)] if broken else []),
        as_json=as_json,
    )
    return 1 if broken else 0


def _artifacts(folder: Path) -> list[Path]:
    """The files NAME.safetensors of a folder, and what each run in it trained, in order of their names."""
    from prefixtune.prefix.folder import ENDING, list_names, path_of
    from prefixtune.prefix.hub import FILE
    from prefixtune.training.run_folder import STATE_FILE, WEIGHTS_FILE

    here = [path_of(folder, name) for name in list_names(folder) - {STATE_FILE.removesuffix(ENDING)}]
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
    return {
        **row,
        "method": header.get("method", "prefix"),
        "backbone": backbone_origin(header).name or None,
        "task": header.get("task"),
    }


def _length(lengths: Mapping[str, int]) -> str:
    """A prefix's length; where that of its sites differs, each with its site."""
    if len(set(lengths.values())) == 1:
        return str(next(iter(lengths.values())))
    return ", ".join(f"{site} {length}" for site, length in lengths.items())


def _flatten(header: Mapping[str, Any], above: str = "") -> Iterator[list[str]]:
    """A header's entries as rows; long values are cut."""
    for key, value in header.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{above}{key}.")
        else:
            text = json.dumps(value, ensure_ascii=False)
            yield [f"{above}{key}", text if len(text) <= 90 else f"{text[:87]}..."]
