"""Pages: the playground, training, and the HTTP interface to read and try (Swagger UI). All of them ask for a key."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib.resources import files

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse

from prefixtune.server.responses import not_found

_LINK = re.compile(r'<nav id="pages".*</nav>')
"""Between the playground and the page for training, where both are there."""
router = APIRouter()
start = APIRouter()
"""The playground, which needs an engine."""


@start.get("/", response_class=HTMLResponse)
async def show_page(request: Request) -> Response:
    """A page to try things on."""
    return _page("playground.html", linked=request.app.state.server.config.takes_jobs)


@router.get("/train", response_class=HTMLResponse)
async def show_training(request: Request) -> Response:
    """A page to train on."""
    if not request.app.state.server.config.takes_jobs:
        raise not_found("page", "train")
    return _page("train.html", linked=request.app.state.server.has_engine)


@router.get("/docs", response_class=HTMLResponse)
async def show_docs() -> Response:
    """This interface, to read and try."""
    return _page("docs.html", scripts="'self'", styles="'self'")


@functools.cache
def _page(name: str, *, scripts: str = "", styles: str = "", linked: bool = True) -> Response:
    """A page with its scripts and styles in it. Only these run, whatever a model generates, and those that it names."""
    folder = files("prefixtune.server") / "playground"
    allowed = {"js": scripts.split(), "css": styles.split()}

    def insert(match: re.Match[str]) -> str:
        text = folder.joinpath(match[1]).read_text("utf-8")
        digest = hashlib.sha256(text.encode()).digest()
        allowed[match[2]].append(f"'sha256-{base64.b64encode(digest).decode()}'")
        return text

    html = re.sub(r"/\* (\w+\.(\w+)) \*/", insert, folder.joinpath(name).read_text("utf-8"))
    if not linked:
        html = _LINK.sub("", html)
    policy = (
        f"default-src 'none'; style-src {' '.join(allowed['css'])}; script-src {' '.join(allowed['js'])}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return HTMLResponse(html, headers={"content-security-policy": policy})
