"""The words or the text that a run starts from: given as they are, or as `@FILE`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixtune.data.streams import read_text
from prefixtune.errors import DataError
from prefixtune.training.config import TrainConfig

__all__ = ["MAX_TEXT_BYTES", "InitText", "check_init_text", "read_init_text", "stored_text"]


_MAX_STORED, _MAX_STORED_BEFORE = 10_000, 1_000
MAX_TEXT_BYTES = 2**20
"""Most bytes of a file that a run starts from."""


@dataclass(frozen=True)
class InitText:
    """What `init_text` gives.

    Attributes:
        text: The words or the text.
        file: Name of the file that holds it; empty: the text itself was given.
    """

    text: str
    file: str = ""

    @property
    def description(self) -> dict[str, Any]:
        """What a header says of it: a file's name, or the text; of a long one the beginning, and how long it is."""
        if self.file:
            return {"file": self.file}
        if len(self.text) <= _MAX_STORED:
            return {"text": self.text}
        return {"text": self.text[:_MAX_STORED], "characters": len(self.text)}


def stored_text(description: Mapping[str, Any]) -> str | None:
    """The whole text that a header's `initialization` names; None: it has none, or only the beginning of it."""
    text, characters = description.get("text"), description.get("characters")
    if not isinstance(text, str) or characters not in (None, len(text)):
        return None
    # Earlier versions stored 1,000 characters, and did not say of how many.
    return None if characters is None and len(text) == _MAX_STORED_BEFORE else text


def read_init_text(init_text: str) -> InitText:
    """The text that `init_text` gives: what it says, or with `@` in front the content of that file.

    Raises:
        DataError: The file is missing, empty, too large, or no UTF-8 text.
    """
    if not init_text.startswith("@"):
        return InitText(init_text)
    path = Path(init_text[1:])
    if path.is_dir() or not init_text[1:]:
        raise DataError(
            f"init_text is {init_text!r}, but a file is needed after @.", hint="write it as in --init-text @prompt.txt."
        )
    return InitText(read_text(path, max_bytes=MAX_TEXT_BYTES, needed="one word"), path.name)


def check_init_text(config: TrainConfig) -> None:
    """Refuse, before a backbone loads, a file that cannot be read, and a text that is surely shorter than P.

    Raises:
        ConfigError: The text has fewer tokens than positions are wanted.
        DataError: The file cannot be read.
    """
    source = read_init_text(config.init_text)
    if config.initialization != "text":
        return
    # A token holds a byte at least, but for a blank that some tokenizers put in front.
    most = len(source.text.encode("utf-8", "surrogatepass")) + 1
    if most < config.longest:
        raise too_short(source, f"has at most {most:,} tokens", config)


def too_short(source: InitText, count: str, config: TrainConfig) -> DataError:
    """The error of a text that has fewer tokens than the prefix has positions."""
    name = source.file or f"init_text {source.text[:40]!r}"
    wanted = f"sites is {config.sites!r}" if config.sites else f"prefix_length is {config.prefix_length}"
    return DataError(
        f"{name} {count}, but {wanted}.",
        hint="give a smaller --prefix-length (0: as long as the text), or --initialization words, which repeats them.",
    )
