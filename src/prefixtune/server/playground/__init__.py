"""The playground: one page, made of `page.html`, `style.css` and `script.js`."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

__all__ = ["Playground"]


class Playground:
    """The page, as an ASGI application; made once."""

    def __init__(self) -> None:
        folder = files("prefixtune.server") / "playground"
        style, script = (folder.joinpath(name).read_text("utf-8") for name in ("style.css", "script.js"))
        page = folder.joinpath("page.html").read_text("utf-8")
        html = page.replace("/* style.css */", style).replace("/* script.js */", script)
        # Only this very script and this very style run, whatever a model generates.
        policy = (
            f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        self.response = Response(html, media_type="text/html", headers={"content-security-policy": policy})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with the page."""
        await self.response(scope, receive, send)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
