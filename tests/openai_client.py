"""OpenAI's unmodified client, against an application in this process."""

import asyncio
from contextlib import asynccontextmanager

import httpx2
import openai


@asynccontextmanager
async def client_of(app, key="none"):
    """A client that reaches the application."""
    transport = httpx2.ASGITransport(app, client=("127.0.0.1", 1))
    async with (
        httpx2.AsyncClient(transport=transport) as http,
        openai.AsyncOpenAI(base_url="http://127.0.0.1:8000/v1", api_key=key, http_client=http, max_retries=0) as client,
    ):
        yield client


def ask(app, work, key="none"):
    """What some calls of the client return."""

    async def run():
        async with client_of(app, key) as client:
            return await work(client)

    return asyncio.run(run())
