"""`prefixtune push`: a prefix goes to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from prefixtune.cli.options import OutputOptions, command, json_option, positional
from prefixtune.cli.show import show
from prefixtune.utils.console import Console

__all__ = ["push"]


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
    from prefixtune.backbone.prefixes import load_prefix

    prefix = load_prefix(options.file)
    if options.card:
        print(prefix.card(options.repo, options.evaluation), end="")
        return 0
    Console(quiet=options.quiet).info(f"uploading {options.file} to {options.repo} ...")
    url = prefix.push_to_hub(
        options.repo,
        evaluation=options.evaluation,
        private=not options.public,
        revision=options.revision,
        commit_message=options.message,
    )
    show({"repo": options.repo, "url": url}, url, as_json=options.as_json)
    return 0
