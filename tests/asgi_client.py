"""Requests to a server's application in this process, sent as uvicorn would send them."""

import asyncio
import json

NEVER = "a body that does not arrive"


class Response:
    """The response to one request."""

    def __init__(self):
        self.status, self.headers, self.body, self.ended = 0, dict[str, str](), b"", False

    @property
    def json(self):
        """The body."""
        return json.loads(self.body)

    @property
    def code(self):
        """The code of an error."""
        return self.json["error"]["code"]


async def send(
    app, method, path, body=None, *, headers=None, disconnected=None, before_reading=None, client="127.0.0.1", into=None
):
    """Send a request.

    Args:
        app: The application.
        method: Of HTTP.
        path: Of the URL, with its query.
        body: Bytes, or what is sent as JSON.
        headers: More headers.
        disconnected: Set when the client disconnects.
        before_reading: What the client does before it reads a piece of the response.
        client: Its address.
        into: What the response is collected in, as it arrives; None: a new one.
    """
    response, sent, disconnected = into or Response(), False, disconnected or asyncio.Event()
    headers = {"host": "127.0.0.1:8000", "content-type": "application/json", **(headers or {})}
    path, _, query = path.partition("?")
    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()], "root_path": "",
        "client": (client, 1),
    }  # fmt: skip

    data = body if isinstance(body, bytes) else b"" if body in (None, NEVER) else json.dumps(body).encode()

    async def receive():
        nonlocal sent
        if not sent and body is not NEVER:
            sent = True
            return {"type": "http.request", "body": data}
        await disconnected.wait()
        return {"type": "http.disconnect"}

    async def take(message):
        if message["type"] == "http.response.start":
            response.status = message["status"]
            response.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            return
        if before_reading is not None:
            await before_reading()
        response.body += message.get("body", b"")
        response.ended = not message.get("more_body", False)

    await asyncio.wait_for(app(scope, receive, take), 30)
    return response


def completion(**fields):
    """A body of `/v1/completions` for the prefix `a`: five tokens, greedy."""
    return {"model": "a", "prompt": "hello", "max_tokens": 5, "temperature": 0, **fields}


def keys(**rules):
    """A server's keys by name, with their rules; the key of NAME is `pt-NAME`."""
    from prefixtune.server.auth import hash_key
    from prefixtune.server.settings import KeyConfig

    return {name: KeyConfig(hash=hash_key(f"pt-{name}"), **own) for name, own in rules.items()}


def bearer(name):
    """The header with the key `pt-NAME`."""
    return {"authorization": f"Bearer pt-{name}"}


def texts_when_done(state):
    """How many texts a server still counts once its engine has ended all requests."""

    async def wait():
        while state.worker.num_unfinished:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(wait(), 10))
    return int(state.gate.count)
