"""The playground: one page, made of `page.html`, `style.css` and `script.js`."""

from __future__ import annotations

import base64
import functools
import hashlib
from importlib.resources import files

from fastapi import Response
from fastapi.responses import HTMLResponse

from prefixtune.server.api.openapi import api_router

__all__ = ["router"]


router = api_router(500)


@router.get("/", response_class=HTMLResponse)
async def show_page() -> Response:
    """A page to try things on."""
    return _page()


@functools.cache
def _page() -> Response:
    folder = files("prefixtune.server") / "playground"
    style, script = (folder.joinpath(name).read_text("utf-8") for name in ("style.css", "script.js"))
    page = folder.joinpath("page.html").read_text("utf-8")
    html = page.replace("/* style.css */", style).replace("/* script.js */", script)
    # Only this very script and this very style run, whatever a model generates.
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return HTMLResponse(html, headers={"content-security-policy": policy})


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
