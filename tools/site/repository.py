"""Links of a page to the repository's files: the same relative links work on a code host and on the site.

`../CONTRIBUTING.md` leads to the page of the site that stands for it, any other file or folder outside the pages
(`../tests/integrations/test_vllm.py`, `../deploy`) to a page with its text, which is made here. A link to what is not
there stays as it is, and myst reports it. A page that `site_repository_pages` names holds the text of a file outside
`docs/`, with its links turned.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.highlighting import PygmentsBridge
from sphinx.transforms import SphinxTransform

__all__ = ["setup"]

LARGEST = 200_000
"""Bytes of a file that gets a page; a larger one is only named."""
LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s#]+)")


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_config_value("site_root", "", "env", types=(str,))
    app.add_config_value("site_repository_pages", {}, "env", types=(dict,))
    app.connect("source-read", read_page)
    app.connect("env-purge-doc", forget_page)
    app.connect("env-merge-info", merge)
    app.connect("html-collect-pages", file_pages)
    app.add_transform(RepositoryLinks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def read_page(app: Sphinx, docname: str, source: list[str]) -> None:
    """Fill a page that stands for a file outside `docs/`."""
    name = app.config.site_repository_pages.get(docname)
    if name is None:
        return
    path = Path(app.config.site_root, name)
    app.env.note_dependency(str(path))
    here = Path(app.srcdir, docname).parent

    def turn(link: re.Match[str]) -> str:
        return link[1] + os.path.relpath(path.parent / link[2], here)

    source[0] = LINK.sub(turn, path.read_text(encoding="utf-8"))


class RepositoryLinks(SphinxTransform):  # type: ignore[misc]
    """Turns links that leave `docs/`, before downloads are collected and references resolved."""

    default_priority = 5

    def apply(self, **kwargs: Any) -> None:
        """Look at every link that myst made."""
        for node in list(self.document.findall(addnodes.pending_xref)):
            if node.get("reftype") == "myst":
                self.turn(node)
        for node in list(self.document.findall(addnodes.download_reference)):
            if node.get("reftype") == "myst":
                self.turn(node)

    def turn(self, node: nodes.Element) -> None:
        """Lead one link to a page of the site, if its file or folder is there."""
        srcdir, root = Path(self.env.srcdir), Path(self.config.site_root)
        target = node["reftarget"].partition("#")[0]
        if not target:
            return
        if node.get("refdomain") == "doc":  # a Markdown page: its name has lost its suffix
            path = Path(os.path.normpath(srcdir / f"{target}.md"))
        else:
            path = Path(os.path.normpath(srcdir / self.env.docname)).parent / target
            path = Path(os.path.normpath(path))
        if not path.exists() or not path.is_relative_to(root) or self.env.path2doc(path) in self.env.found_docs:
            return
        name = path.relative_to(root).as_posix()
        pages = {file: page for page, file in self.config.site_repository_pages.items()}
        page = pages.get(name) or pages.get(f"{name}/README.md")
        link: nodes.Element
        if page is not None:  # myst resolves it, with its anchor
            names = {"refdomain": "doc", "reftype": "myst", "reftarget": page, "reftargetid": node.get("reftargetid")}
            link = addnodes.pending_xref("", refdoc=self.env.docname, refexplicit=node.get("refexplicit"), **names)
        else:
            _linked(self.env).setdefault(self.env.docname, set()).add(name)
            uri = self.env.app.builder.get_relative_uri(self.env.docname, _page_name(name))
            link = nodes.reference("", "", internal=True, refuri=uri)
        link += node.children
        node.replace_self(link)


def file_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """A page for every file and folder of the repository that a page links to."""
    root, bridge = Path(app.config.site_root), PygmentsBridge("html", app.config.pygments_style or "default")
    waiting = sorted(set().union(*_linked(app.env).values())) if _linked(app.env) else []
    done: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in done:
            continue
        done.add(name)
        path = root / name
        if path.is_dir():
            children = [child for child in sorted(path.iterdir()) if _has_page(child)]
            waiting += [child.relative_to(root).as_posix() for child in children]
            items = (
                f'<li><a href="{_href(app, name, child, root)}">{html.escape(child.name)}</a></li>'
                for child in children
            )
            body = f"<ul>{''.join(items)}</ul>"
        else:
            body = bridge.highlight_block(path.read_text(encoding="utf-8"), _language(path), force=True)
        yield _page_name(name), {"title": name, "body": f"<h1>{html.escape(name)}</h1>{body}"}, "page.html"


def _href(app: Sphinx, name: str, child: Path, root: Path) -> str:
    return str(app.builder.get_relative_uri(_page_name(name), _page_name(child.relative_to(root).as_posix())))


def _page_name(name: str) -> str:
    return f"repository/{name}"


def _has_page(path: Path) -> bool:
    if path.name.startswith((".", "__")):
        return False
    return path.is_dir() or (path.suffix in LANGUAGES and path.stat().st_size <= LARGEST)


LANGUAGES = {
    ".py": "python",
    ".sh": "bash",
    ".json": "json",
    ".jsonl": "text",
    ".toml": "toml",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".md": "markdown",
    ".conf": "nginx",
    ".service": "ini",
    ".txt": "text",
    ".csv": "text",
    ".html": "html",
}
"""Suffixes of text files, and what Pygments calls them."""


def _language(path: Path) -> str:
    return LANGUAGES.get(path.suffix, "text")


def _linked(env: BuildEnvironment) -> dict[str, set[str]]:
    """Page -> names of the repository's files that it links to."""
    if not hasattr(env, "site_linked_files"):
        env.site_linked_files = {}
    files: dict[str, set[str]] = env.site_linked_files
    return files


def forget_page(app: Sphinx, env: BuildEnvironment, docname: str) -> None:
    """Called before a page is read again."""
    _linked(env).pop(docname, None)


def merge(app: Sphinx, env: BuildEnvironment, docnames: list[str], other: BuildEnvironment) -> None:
    """Called after pages were read by another process."""
    _linked(env).update({name: files for name, files in _linked(other).items() if name in docnames})
