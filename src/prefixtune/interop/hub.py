"""Prefixes on the Hugging Face hub: `push` uploads a prefix with a model card, `pull` downloads one.

A repository holds `prefix.safetensors` and `README.md`: a card made from the prefix's header and, where it was
evaluated, the scores in the hub's model-index format. Only these two functions use the network, and names such as
`hub:OWNER/NAME` (see `prefixtune.prefix.hub`).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from prefixtune.backbone.prefixes import load_prefix
from prefixtune.errors import CheckpointError
from prefixtune.prefix.card import check_complete
from prefixtune.prefix.hub import FILE, check_repository, download
from prefixtune.prefix.prefix import Prefix
from prefixtune.utils.files import atomic_path, check_writable

__all__ = ["FILE", "card_of", "pull", "push"]


def push(
    path: str | Path,
    repo_id: str,
    *,
    evaluation: Any = None,
    private: bool = True,
    revision: str | None = None,
    token: str | None = None,
    message: str = "",
) -> str:
    """Upload a prefix with its card; creates the repository where it does not exist.

    Args:
        path: The artifact, or the folder of its run.
        repo_id: `OWNER/NAME`.
        evaluation: Whose scores go into the card: `evaluation.json` of `prefixtune evaluate`, its folder, or several;
            None: nobody's.
        private: Only its owner can see a new repository.
        revision: A branch; None: the main branch.
        token: The hub's token; None: the one that `hf auth login` stored.
        message: The commit message; empty: one with the file's name.

    Returns:
        The address of the upload.

    Raises:
        CheckpointError: The file is not a prefix.
        ConfigError: An evaluation cannot be read, the repository's name is not valid, or the prefix needs a LoRA
            adapter.
        PrefixError: The hub cannot be reached, or refuses.
    """
    return load_prefix(path).push_to_hub(
        repo_id, evaluation=evaluation, private=private, revision=revision, token=token, commit_message=message
    )


def card_of(path: str | Path, repo_id: str, evaluation: Any = None) -> str:
    """The model card that `push` uploads; arguments as there.

    Raises:
        PrefixError: As `push`, but for the hub.
    """
    prefix = load_prefix(path)
    check_complete(prefix.header)
    check_repository(repo_id)
    return prefix.card(repo_id, evaluation)


def pull(
    repo_id: str, output: str | Path, *, revision: str | None = None, token: str | None = None, name: str = FILE
) -> Prefix:
    """Download a prefix, check it, and store it in a file.

    Args:
        repo_id: `OWNER/NAME`.
        output: Ends with `.safetensors`. An existing file is replaced only by a valid prefix.
        revision: A branch, a tag or a commit; None: the main branch.
        token: The hub's token; None: the one that `hf auth login` stored.
        name: The file in the repository.

    Raises:
        CheckpointError: The download is not a prefix, or the output has another ending.
        ConfigError: It needs a LoRA adapter, which is not in the output's folder.
        PrefixError: The hub cannot be reached, or has no such file.
    """
    output = Path(output)
    if output.suffix != ".safetensors":
        raise CheckpointError(f"{str(output)!r} does not end with .safetensors.", hint="choose such a name.")
    check_writable(output)
    downloaded = download(repo_id, name, revision=revision, token=token)
    prefix = load_prefix(downloaded)
    check_complete(prefix.header, output.parent)
    with atomic_path(output) as temporary:
        shutil.copyfile(downloaded, temporary)
    return prefix
