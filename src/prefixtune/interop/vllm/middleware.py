"""The middleware of vLLM's server: prefixes in a folder are models there.

Requests for a prefix are rewritten, and so are their responses. Where there is a training server, requests about
training are passed on to it. Everything else passes unchanged.
"""

from __future__ import annotations

import asyncio

from prefixtune.interop.vllm.http import (
    APIError,
    App,
    JSONRewriter,
    Message,
    Receive,
    Scope,
    Send,
    read_body,
    replay_body,
    send_json,
    with_content_length,
)
from prefixtune.interop.vllm.requests import BackboneRequest, rewrite_request
from prefixtune.interop.vllm.responses import ResponseRewriter, add_models
from prefixtune.interop.vllm.state import ServerState
from prefixtune.interop.vllm.training import TrainingForwarder, is_about_training, needs_key

__all__ = ["PrefixMiddleware"]


_COMPLETIONS, _CHAT, _MODELS = "/v1/completions", "/v1/chat/completions", "/v1/models"


class PrefixMiddleware:
    """Named in vLLM's `--middleware`.

    Args:
        app: vLLM's application.
    """

    def __init__(self, app: App) -> None:
        self.app = app
        self._state: ServerState | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, or leave it to vLLM."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path, method = scope["path"].removeprefix(scope.get("root_path", "")), scope["method"]
        if method == "GET" and path == _MODELS:
            return await self._list_models(scope, receive, send)
        if method == "POST" and path in (_COMPLETIONS, _CHAT):
            return await self._generate(scope, receive, send, is_chat=path == _CHAT)
        if is_about_training(scope, path):
            return await self._train(path, scope, receive, send)
        return await self.app(scope, receive, send)

    async def _list_models(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = await self._load_state(scope)
        prefixes = await asyncio.to_thread(state.prefixes.all)
        await self.app(scope, receive, JSONRewriter(send, lambda value: add_models(value, prefixes, state)))

    async def _generate(self, scope: Scope, receive: Receive, send: Send, *, is_chat: bool) -> None:
        state = await self._load_state(scope)
        if state.has_keys and await self._refuse_without_key(scope, receive, send):
            return
        max_bytes = state.settings.max_body_bytes
        body = await read_body(receive, max_bytes)
        try:
            if body is None:
                raise APIError(f"the request is longer than {max_bytes} bytes.", status=413)
            request = await asyncio.to_thread(rewrite_request, state, body, is_chat=is_chat)
        except APIError as error:
            await send_json(send, error.status, error.to_dict())
            return
        if request is None:
            await self.app(scope, replay_body(body, receive), send)
        else:
            await self._forward(request, scope, receive, send)

    async def _forward(self, request: BackboneRequest, scope: Scope, receive: Receive, send: Send) -> None:
        """Have vLLM answer a rewritten request."""
        scope = with_content_length(scope, len(request.body))
        rewriter = JSONRewriter(send, ResponseRewriter(request), request.headers)
        await self.app(scope, replay_body(request.body, receive), rewriter)

    async def _train(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to the training server, if there is one."""
        state = await self._load_state(scope)
        socket = state.settings.training_socket
        if not socket:
            return await self.app(scope, receive, send)
        if state.has_keys and needs_key(path) and await self._refuse_without_key(scope, receive, send):
            return None
        return await TrainingForwarder(socket, has_keys=state.has_keys).forward(scope, path, receive, send)

    async def _load_state(self, scope: Scope) -> ServerState:
        if self._state is None:
            self._state = await asyncio.to_thread(ServerState.from_app, scope["app"].state)
        return self._state

    async def _refuse_without_key(self, scope: Scope, receive: Receive, send: Send) -> bool:
        """Whether vLLM refuses the client; then its response has been sent.

        vLLM checks API keys only after this middleware, so it is asked with a harmless request first.
        """
        messages: list[Message] = []

        async def collect(message: Message) -> None:
            messages.append(message)

        await self.app({**scope, "method": "GET", "path": _MODELS, "raw_path": _MODELS.encode()}, receive, collect)
        if messages[0]["type"] == "http.response.start" and messages[0]["status"] not in (401, 403):
            return False
        for message in messages:
            await send(message)
        return True
