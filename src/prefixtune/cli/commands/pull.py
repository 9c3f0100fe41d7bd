"""`prefixtune pull`: download a prefix from the Hugging Face hub."""

from __future__ import annotations

from pydantic import Field

from prefixtune.cli.common import print_json
from prefixtune.cli.options import OutputOptions, command, json_option, positional
from prefixtune.utils.console import Console

__all__ = ["pull"]


class PullOptions(OutputOptions):
    """The options of `prefixtune pull`."""

    repo: str = positional(description="repository, OWNER/NAME")
    output: str = positional(description="a .safetensors file to write")
    file: str = Field("", description="name of the file in the repository (default: prefix.safetensors)")
    revision: str | None = Field(None, description="branch, tag or commit (default: the main branch)")
    as_json: bool = json_option("what was done")


@command
def pull(options: PullOptions) -> int:
    """Download a prefix from the Hugging Face hub, and check it.

    For example:
        prefixtune pull me/e2e-prefix e2e.safetensors
    """
    from prefixtune.interop import hub

    Console(quiet=options.quiet).info(f"downloading from {options.repo} ...")
    prefix = hub.pull(options.repo, options.output, revision=options.revision, name=options.file or hub.FILE)
    if options.as_json:
        print_json({"repo": options.repo, "path": options.output, "parameters": prefix.num_parameters})
    else:
        print(f"{options.output}: {prefix.num_parameters:,} parameters")
    return 0
