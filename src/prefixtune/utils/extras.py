"""Optional libraries: where one is missing, the error names the extra of this package that installs it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from prefixtune.errors import ConfigError


@contextlib.contextmanager
def needs_extra(extra: str, what: str, otherwise: str = "") -> Iterator[None]:
    """Import the libraries of an extra within this block.

    Args:
        extra: Its name in pyproject.toml.
        what: What needs them, for the error.
        otherwise: Another way out, as in ", or export the set as JSON lines".

    Raises:
        ConfigError: A library is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or extra).partition(".")[0]
        raise ConfigError(
            f"{what} needs {package}, which is not installed.", hint=f"pip install 'prefixtune[{extra}]'{otherwise}."
        ) from error
