"""`prefixtune push` and `pull`: prefixes on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from prefixtune.cli.common import print_json
from prefixtune.cli.options import OutputOptions, command, json_option, positional
from prefixtune.utils.console import Console

__all__ = ["pull", "push"]


class PushOptions(OutputOptions):
    """The options of `prefixtune push`."""

    file: str = positional(description="a .safetensors file of `prefixtune train`, or its run's folder")
    repo: str = positional(description="repository, OWNER/NAME; made where there is none")
    evaluation: str | None = Field(
        None,
        description="folder of `prefixtune evaluate`, whose scores are written into the card",
    )
    public: bool = Field(False, description="let everybody see a new repository")
    message: str = Field("", description="of the commit")
    card: bool = Field(False, description="print the model card, and send nothing")
    revision: str | None = Field(None, description="branch that the repository has (default: the main branch)")
    as_json: bool = json_option("what was done")

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """A card is no JSON."""
        if self.card and self.as_json:
            yield ("card", "as_json"), "--card prints the card, not JSON; leave one of the two out"


@command
def push(options: PushOptions) -> int:
    """Upload a prefix to the Hugging Face hub, with a model card made from its header and scores.

    For example:
        prefixtune push runs/e2e/prefix.safetensors me/e2e-prefix --evaluation runs/e2e/evaluation
        prefixtune push runs/e2e/prefix.safetensors me/e2e-prefix --card
    """
    from prefixtune.interop import hub

    if options.card:
        print(hub.card_of(options.file, options.repo, options.evaluation), end="")
        return 0
    Console(quiet=options.quiet).info(f"uploading {options.file} to {options.repo} ...")
    url = hub.push(
        options.file,
        options.repo,
        evaluation=options.evaluation,
        private=not options.public,
        revision=options.revision,
        message=options.message,
    )
    if options.as_json:
        print_json({"repo": options.repo, "url": url})
    else:
        print(url)
    return 0


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
