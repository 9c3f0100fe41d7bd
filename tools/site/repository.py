"""Links of a page to the repository's files: the same relative links work on a code host and on the site.

`../CONTRIBUTING.md` leads to the page of the site that stands for it, any other file outside the pages
(`../tests/integrations/test_vllm.py`) to a copy of it, and the name of a folder is plain text. A link to what is not
there stays as it is, and myst reports it. A page that `site_repository_pages` names holds the text of a file outside
`docs/`, with its links turned.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s#]+)")


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_config_value("site_root", "", "env", types=(str,))
    app.add_config_value("site_repository_pages", {}, "env", types=(dict,))
    app.connect("source-read", read_page)
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
        for kind in (addnodes.pending_xref, addnodes.download_reference):
            for node in [node for node in self.document.findall(kind) if node.get("reftype") == "myst"]:
                self.turn(node)

    def turn(self, node: nodes.Element) -> None:
        """Lead one link to a page of the site, if its file or folder is there."""
        srcdir, root = Path(self.env.srcdir), Path(self.config.site_root)
        target = node["reftarget"].partition("#")[0]
        if not target:
            return
        is_page = node.get("refdomain") == "doc"  # a Markdown page: its name has lost its suffix
        path = srcdir / f"{target}.md" if is_page else (srcdir / self.env.docname).parent / target
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
        elif path.is_dir():
            link = nodes.inline()
        else:
            link = addnodes.download_reference(
                "", "", reftarget=os.path.relpath(path, Path(self.env.doc2path(self.env.docname)).parent)
            )
        link += node.children
        node.replace_self(link)
