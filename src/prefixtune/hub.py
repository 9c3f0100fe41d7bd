"""Files of the Hugging Face hub: which texts name a repository, and bringing a file of one here.

Nothing goes over the network but in `download`. Knows nothing of what is in the files.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from prefixtune import __version__
from prefixtune.errors import ConfigError, PrefixError

__all__ = ["FILE", "download", "hub_errors", "is_hub_id"]

FILE = "prefix.safetensors"
"""A prefix's name in a repository."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def is_hub_id(name: str | os.PathLike[str]) -> bool:
    """Whether a text names a repository of the hub, and nothing on this machine.

    Where the part before the slash is a folder here, the text is a path, even of a file that is missing: a mistyped
    path is never looked for elsewhere.

    >>> is_hub_id("me/e2e-prefix"), is_hub_id("runs/prefix.safetensors"), is_hub_id("./me/prefix"), is_hub_id("prefix")
    (True, False, False, False)
    """
    if not isinstance(name, str) or not _ID.fullmatch(name) or name.endswith((".safetensors", ".gguf", ".json")):
        return False
    return not Path(name).exists() and not Path(name).parent.exists()


def download(repo_id: str, name: str = FILE, *, revision: str | None = None, token: str | None = None) -> Path:
    """Bring a file of a repository here, into the hub's own cache.

    Args:
        repo_id: `OWNER/NAME`.
        name: The file in the repository.
        revision: A branch, a tag or a commit; None: the main branch.
        token: Of the hub; None: the one that `hf auth login` stored.

    Raises:
        ConfigError: The name is none, or the hub is switched off.
        PrefixError: The hub cannot be reached, or has no such file.
    """
    from huggingface_hub import hf_hub_download

    with hub_errors(f"cannot download {name!r} of {repo_id!r}"):
        return Path(
            hf_hub_download(
                repo_id, name, revision=revision, token=token, library_name="prefixtune", library_version=__version__
            )
        )


@contextlib.contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """What goes wrong on the way to the hub, in one line and with a way out."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hint = "check the name; private repositories need `hf auth login`."
    try:
        yield
    except HFValidationError as error:
        raise ConfigError(f"{what}: {error}", hint="write OWNER/NAME.") from error
    except OfflineModeIsEnabled as error:
        raise ConfigError(f"{what}: the hub is switched off.", hint="unset HF_HUB_OFFLINE.") from error
    except LocalTokenNotFoundError as error:
        raise ConfigError(
            f"{what}: there is no token.", hint="log in with `hf auth login`, or set HF_TOKEN."
        ) from error
    except LocalEntryNotFoundError as error:
        raise PrefixError(f"{what}: the hub cannot be reached.", hint="check the connection.") from error
    except RepositoryNotFoundError as error:
        raise PrefixError(f"{what}: there is no such repository, or it is not yours.", hint=hint) from error
    except RevisionNotFoundError as error:
        raise PrefixError(f"{what}: there is no such revision.", hint="leave it out for the main branch.") from error
    except EntryNotFoundError as error:
        raise PrefixError(f"{what}: the repository has no such file.", hint="name it with --file.") from error
    except HfHubHTTPError as error:
        told = str(error.server_message or error).splitlines()[0]
        raise PrefixError(f"{what}: the hub answers {error.response.status_code}: {told}", hint=hint) from error
    except Exception as error:
        # Of whichever client library this version of huggingface_hub uses.
        client = type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "requests")
        if not client and not isinstance(error, OSError):
            raise
        raise PrefixError(f"{what}: {str(error).rstrip('.')}.", hint="check the connection.") from error
