"""`prefixtune doctor`: check that a backbone carries prefixes correctly."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from prefixtune.cli.common import print_json
from prefixtune.cli.loading import DEFAULT_BACKBONE, load
from prefixtune.cli.options import OutputOptions, command, json_option, positional
from prefixtune.utils.config import DTypeName
from prefixtune.utils.console import Console

__all__ = ["doctor"]

_SHOWN_WEIGHTS = 10
"""Most names of unused weights that `doctor` prints; `--json` prints all."""


class DoctorOptions(OutputOptions):
    """The options of `prefixtune doctor`."""

    backbone: str = positional(DEFAULT_BACKBONE, description="embedded name, hub id, folder or .gguf file")
    dtype: DTypeName = Field("float32", description="dtype of the frozen weights; float32 is checked most strictly")
    device: str = Field("auto", description="cpu, cuda, cuda:0, mps or auto")
    quantize: Literal["", "int8", "int4"] = Field("", description="quantize the frozen weights (torchao)")
    as_json: bool = json_option("every check")


@command
def doctor(options: DoctorOptions) -> int:
    """Check that a backbone carries prefixes correctly; exits with 1 if anything fails.

    Run it once for every backbone and version of transformers that you rely on.
    """
    from prefixtune.doctor.examine import examine

    console = Console(quiet=options.quiet)
    backbone = load(console, options.backbone, options)
    checks = examine(
        backbone, on_check=lambda check: console.info(f"{'ok  ' if check.passed else 'FAIL'} {check.name}")
    )
    failed = [check for check in checks if not check.passed]
    unused = backbone.unused_weights
    if options.as_json:
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
