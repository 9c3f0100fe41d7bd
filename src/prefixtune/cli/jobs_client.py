"""OpenAI's files and fine-tuning jobs of a server."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from prefixtune.errors import ConfigError, RequestError

__all__ = ["JobsClient"]


_ENDED = ("succeeded", "failed", "cancelled", "paused")
JOBS = "/fine_tuning/jobs"
_PAGE, _PAUSE = 100, 1.0
_AWAY = (502, 503, 504)
_CONNECT_SECONDS, _ANSWER_SECONDS = 10.0, 600.0


class JobsClient:
    """What a server can be asked to train. Files, jobs and events are as the server says them.

    A key is sent to this server alone: redirects are not followed. Every method raises a `RequestError` where the
    server is away, refuses, or answers in another shape.

    Args:
        url: Where its interface is, such as `http://127.0.0.1:8000/v1`.
        key: Sent with each request; empty: none.
        patience: Seconds in which a question is asked again while the server is away.

    Raises:
        ConfigError: The address is none.
    """

    def __init__(self, url: str, key: str, patience: float) -> None:
        import httpx2

        if not re.match(r"https?://[^@/?#]+(/[^?#]*)?$", url):
            raise ConfigError(
                "--url must be an address of http or https, without a key in it.", hint="http://127.0.0.1:8000/v1, say."
            )
        self.url, self._patience = url.rstrip("/"), patience
        # Proxies of the environment are for other machines.
        is_here = httpx2.URL(url).host in ("localhost", "127.0.0.1", "::1")
        self._client = httpx2.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(_ANSWER_SECONDS, connect=_CONNECT_SECONDS),
            trust_env=not is_here,
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def bare_model(self) -> str:
        """The name of the model without a prefix."""
        bare = [str(model["id"]) for model in self.list("/models") if model.get("parent") is None]
        if len(bare) != 1:
            raise RequestError(
                f"{self.url} does not say which of its models is the bare one.", hint="name it with --model."
            )
        return bare[0]

    def upload(self, file: Path, purpose: str) -> dict[str, Any]:
        """Upload a file."""
        try:
            with file.open("rb") as stream:
                return self.ask("POST", "/files", data={"purpose": purpose}, files={"file": stream})
        except OSError as error:
            raise ConfigError(f"cannot read {str(file)!r}: {error.strerror}.", hint="check the path.") from error

    def list(self, path: str, **parameters: str | int) -> list[dict[str, Any]]:
        """A page of `/files`, `/models` or jobs, the newest first."""
        found = self.ask("GET", path, params=parameters).get("data")
        if not isinstance(found, list) or not all(isinstance(one, dict) and "id" in one for one in found):
            raise self._foreign()
        return found

    def delete(self, path: str, name: str) -> None:
        """Delete one of `/files` or `/models`."""
        self.ask("DELETE", f"{path}/{quote(name, safe='')}")

    def create(self, request: dict[str, Any]) -> dict[str, Any]:
        """Ask for a training, again if need be: by its key the server makes it once."""
        return self.ask("POST", JOBS, json=request, headers={"Idempotency-Key": secrets.token_hex(16)})

    def job(self, job_id: str, action: str = "") -> dict[str, Any]:
        """One job; with `cancel`, `pause` or `resume`, how it stands after that."""
        path = f"{JOBS}/{quote(job_id, safe='')}"
        job = self.ask("POST", f"{path}/{action}") if action else self.ask("GET", path)
        if not isinstance(job.get("status"), str):
            raise self._foreign()
        return job

    def follow(self, job_id: str, on_event: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Call `on_event` with each event, from the first on, until the job stands still; returns how it stands."""
        known = set[str]()
        while True:
            job = self.job(job_id)
            new: list[dict[str, Any]] = []
            page = self.list(f"{JOBS}/{quote(job_id, safe='')}/events", limit=_PAGE)
            while fresh := [event for event in page if event["id"] not in known]:
                new += fresh
                known |= {event["id"] for event in fresh}
                if len(page) < _PAGE:
                    break
                page = self.list(f"{JOBS}/{quote(job_id, safe='')}/events", limit=_PAGE, after=page[-1]["id"])
            for event in reversed(new):
                on_event(event)
            if job["status"] in _ENDED:
                return job
            time.sleep(_PAUSE)

    def ask(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """The object of an answer; a question, or what has a key, is asked again while the server is away."""
        import httpx2

        end = time.monotonic() + self._patience
        while True:
            try:
                response = self._client.request(method, self.url + path, **options)
                status, answer = response.status_code, response.json()
                if response.is_success and isinstance(answer, dict):
                    return answer
                message = str(answer["error"]["message"])
            except httpx2.HTTPError as error:
                status, message = 0, f"{self.url} cannot be reached: {error}."
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise self._foreign() from error
            may_ask_again = (method == "GET" or "headers" in options) and (not status or status in _AWAY)
            if not may_ask_again or time.monotonic() > end:
                hint = "does --url name a server of `prefixtune serve`?" if not status else ""
                hint = "give a key with --key, or in the variable PREFIXTUNE_API_KEY." if status == 401 else hint
                raise RequestError(message, hint=hint)
            time.sleep(_PAUSE)

    def _foreign(self) -> RequestError:
        return RequestError(
            f"{self.url} answers in a shape that OpenAI's interface does not have.",
            hint="does --url name a server of `prefixtune serve`, with /v1 at its end?",
        )
