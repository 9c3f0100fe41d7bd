"""Find a prefix's file: on this machine, or on the Hugging Face hub; and upload one.

`hub:OWNER/NAME` is downloaded; a name without `hub:` is a path on this machine. Only `download` and `upload` use the
network.
"""

from __future__ import annotations

import contextlib
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path

from prefixtune import __version__
from prefixtune.errors import CheckpointError, ConfigError, PrefixError, describe_value, short_repr
from prefixtune.prefix.card import CARD, is_repository

FILE = "prefix.safetensors"
"""A prefix's name in a repository."""

HUB = "hub:"
"""Marks the name of a repository that is to be downloaded."""


def repository_of(name: str | os.PathLike[str]) -> str | None:
    """The repository that `hub:OWNER/NAME` or `hub:OWNER/NAME@REVISION` names; None: it is a path on this machine.

    A missing path is not looked up on the hub.

    >>> repository_of("hub:me/e2e-prefix"), repository_of("me/e2e-prefix")
    ('me/e2e-prefix', None)

    Raises:
        ConfigError: What follows `hub:` is not a repository's name.
    """
    text = os.fspath(name)
    if not text.startswith(HUB):
        return None
    repository = text.removeprefix(HUB).partition("@")[0]
    if not is_repository(repository):
        raise ConfigError(
            f"{text!r} is not the name of a repository.", hint="write hub:OWNER/NAME, as in hub:me/e2e-prefix."
        )
    return repository


def download(repo_id: str, name: str = FILE, *, revision: str | None = None, token: str | None = None) -> Path:
    """Download a file of a repository into the hub's own cache.

    Args:
        repo_id: `OWNER/NAME`.
        name: The file in the repository.
        revision: A branch, a tag or a commit; None: the main branch.
        token: Of the hub; None: the one that `hf auth login` stored.

    Raises:
        ConfigError: The name is not valid, or the hub is switched off.
        PrefixError: The hub cannot be reached, or has no such file.
    """
    from huggingface_hub import hf_hub_download

    with hub_errors(f"cannot download {name!r} of {repo_id!r}"):
        return Path(
            hf_hub_download(
                repo_id, name, revision=revision, token=token, library_name="prefixtune", library_version=__version__
            )
        )


def upload(
    file: Path,
    card: str,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    token: str | None = None,
    message: str = "",
) -> str:
    """Upload a prefix's file and its card in one commit; creates the repository where it does not exist.

    Args:
        file: The artifact.
        card: The model card.
        repo_id: `OWNER/NAME`.
        private: Only its owner can see a new repository.
        revision: A branch; None: the main branch.
        token: Of the hub; None: the one that `hf auth login` stored.
        message: The commit message; empty: one with the file's name.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: The repository's name or the card is not valid, or the hub is switched off.
        PrefixError: The hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, ModelCard

    if not is_repository(repo_id):
        raise ConfigError(f"{short_repr(repo_id)} is not the name of a repository.", hint="write OWNER/NAME.")
    with hub_errors(f"cannot upload to {repo_id!r}"):
        api = HfApi(token=token, library_name="prefixtune", library_version=__version__)
        # A card that the hub refuses must not leave an empty repository.
        ModelCard(card).validate()
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(FILE, str(file)), CommitOperationAdd(CARD, card.encode())],
            commit_message=message or f"Upload {file.name}",
            revision=revision,
        )
    return str(commit.commit_url)


@contextlib.contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """While the block runs, errors of the hub become one line.

    Raises:
        ConfigError: The hub's library refuses a name or a card, or is switched off.
        PrefixError: The hub cannot be reached, or refuses.
    """
    from huggingface_hub import constants

    try:
        yield
    except Exception as error:  # the library's, and its HTTP client's, of many types
        is_config = isinstance(error, ValueError) or constants.HF_HUB_OFFLINE
        raise (ConfigError if is_config else PrefixError)(
            f"{what}: {textwrap.shorten(str(error), 300) or type(error).__name__}",
            hint="check the names, the connection and HF_HUB_OFFLINE; private repositories need `hf auth login`.",
        ) from error


def prefix_file(path: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None) -> Path:
    """The file that a path, a run's folder or `hub:OWNER/NAME[@REVISION]` names; from the hub it is downloaded.

    Args:
        path: What names it.
        revision: Of a repository: a branch, a tag or a commit; None: the main branch.
        token: Of the hub; None: the one that `hf auth login` stored.

    Raises:
        CheckpointError: There is nothing of that name, or it is a folder without a prefix.
        ConfigError: `path` is not a path, or a revision comes with a path.
        PrefixError: The hub cannot be reached, or has no such file.
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ConfigError(
            f"the prefix is {describe_value(path)}, but must be a path, hub:OWNER/NAME or a Prefix.",
            hint='give "runs/e2e/prefix.safetensors", say, or a list of prefixes, one per text.',
        )
    if (repository := repository_of(path)) is not None:
        return download(repository, revision=revision or os.fspath(path).partition("@")[2] or None, token=token)
    if revision is not None:
        raise ConfigError(
            f"revision is {revision!r}, but {str(path)!r} is no repository of the hub.",
            hint="leave it out, or write OWNER/NAME.",
        )
    try:
        file = Path(path) / FILE if Path(path).is_dir() else Path(path)
        found = file.is_file()
    except OSError as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read: {error.strerror or error}.", hint="check its permissions."
        ) from error
    if not found:
        raise CheckpointError(
            f"there is no file {str(file)!r}.",
            hint="give a file, or the --output folder of a finished training; hub:OWNER/NAME is downloaded.",
        )
    return file


def find_pretrained(name: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None) -> Path:
    """The file that `from_pretrained` means: as in transformers, a path that exists, else a repository of the hub.

    Arguments and errors are those of `prefix_file`; a bare `OWNER/NAME` is a repository, too.
    """
    if not isinstance(name, str) or not is_repository(name) or os.path.lexists(name):
        return prefix_file(name, revision=revision, token=token)
    try:
        return download(name, revision=revision, token=token)
    except PrefixError as error:
        raise type(error)(
            f"there is no file or folder {name!r} here, and on the hub: {error.message}", hint=error.hint
        ) from error
