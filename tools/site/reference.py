"""The pages of the reference that are made from the code whenever the site is built; they are not in the repository."""

from __future__ import annotations

from pathlib import Path

from tools.examples_page import examples_page
from tools.site import cli_reference, configuration_reference, http_reference

PAGES = {
    "cli.md": cli_reference.page,
    "configuration.md": configuration_reference.page,
    "examples.md": examples_page,
    "http.md": http_reference.page,
}


def write(folder: Path) -> None:
    """Write the pages into a folder; one that is current is left alone, so that Sphinx does not read it again."""
    for name, page in PAGES.items():
        path, text = folder / name, page()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
