"""llama.cpp's server as a child process, which ends with its parent, and what is asked of it.

The child runs this file as a script, with the options as a line of JSON on stdin; it prints the server's address once
the model is loaded.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

from prefixtune.errors import BackboneError, RequestError

__all__ = ["LlamaChild", "Refused"]


_SECONDS = 600
"""Until llama.cpp's server has answered, or written its next token."""
_DYING_SECONDS = 2.0
"""Between the end of a process's connections and its own."""
_SHOWN = 300
"""Characters of what it wrote before it ended."""

_SPARE = 8
"""Positions beyond those of the slots."""


class Refused(RequestError):
    """llama.cpp's server refuses a request."""


class LlamaChild:
    """A running server of llama.cpp, which has loaded the model. May be used from any thread.

    Args:
        gguf: The model.
        num_slots: Texts that run at once.
        length: Most positions of each.
        threads: Of the processor.
        states: The folder of saved states.

    Raises:
        BackboneError: It ends before it has loaded the model.
    """

    def __init__(self, gguf: Path, num_slots: int, length: int, threads: int, states: Path) -> None:
        self._token = secrets.token_urlsafe()
        options = {
            "gguf": str(gguf.absolute()),
            "num_slots": num_slots,
            "length": length,
            "threads": threads,
            "states": str(states),
            "token": self._token,
        }
        with tempfile.TemporaryFile() as log:
            self._process = subprocess.Popen(
                # By its file, so that it does not load what the engine's package imports.
                [sys.executable, "-P", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                # The terminal's signals are for the parent, which ends running texts first.
                start_new_session=True,
            )
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            with contextlib.suppress(OSError):
                # Through a pipe: everybody on a machine sees arguments.
                print(json.dumps(options), file=self._process.stdin, flush=True)
            with self._process.stdout as out:
                address = out.readline().strip()
            if not address:
                self.close()
                log.seek(0)
                said = " ".join(log.read().decode(errors="replace").split())
                raise BackboneError(
                    f"llama.cpp cannot serve {str(gguf)!r}: {said[-_SHOWN:] or 'it does not say why'}",
                    hint="check that it is a whole GGUF file of a model; if memory is short, lower --num-slots or "
                    "--max-length.",
                )
        host, _, port = address.removeprefix("http://").rpartition(":")
        self._address = host, int(port)

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def is_dying(self) -> bool:
        """Whether it has ended, or does so in a moment, after a connection to it has failed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_DYING_SECONDS)
        return not self.alive

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def ask(self, path: str, body: Mapping[str, Any]) -> Any:
        """Its answer to a request.

        Raises:
            Refused: It refuses.
            OSError: It cannot be reached.
        """
        with self._post(path, body) as response:
            return json.loads(response.read())

    def stream(self, body: Mapping[str, Any]) -> Generator[Mapping[str, Any]]:
        """The events of a completion; it ends early if the generator is closed.

        Raises:
            Refused: It refuses.
            OSError: It cannot be reached, or the connection ends before the completion.
        """
        with self._post("/completion", body) as response:
            for line in response:
                if line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise RequestError(f"llama.cpp: {event['error'].get('message')}", hint="see its message.")
                    yield event
                    if event["stop"]:
                        return
        raise ConnectionError("llama.cpp's server has ended in the middle of a text.")

    @contextlib.contextmanager
    def _post(self, path: str, body: Mapping[str, Any]) -> Iterator[http.client.HTTPResponse]:
        """Ask; the answer can be read while the block runs."""
        with contextlib.closing(http.client.HTTPConnection(*self._address, timeout=_SECONDS)) as connection:
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._token}"}
            connection.request("POST", path, json.dumps(body), headers)
            with connection.getresponse() as response:
                if response.status != http.HTTPStatus.OK:
                    kind = Refused if response.status == http.HTTPStatus.BAD_REQUEST else RequestError
                    raise kind(f"llama.cpp refuses it: {_message(response.read(2**16))}.", hint="see why.")
                yield response


def _message(content: bytes) -> str:
    """What an error says."""
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return "no reason is given"


def serve(options: dict[str, Any]) -> None:
    """Serve until stdin is closed.

    Args:
        options: `gguf`, `num_slots`, `length` (positions of a slot), `states` (the folder of saved states), `threads`,
            `token` (without it, requests are refused).
    """
    import xllamacpp

    # Whoever interrupts the parent lets it end its texts.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    params = xllamacpp.CommonParams()
    params.model.path = options["gguf"]
    params.n_parallel = options["num_slots"]
    # It ends a text shortly before the cells do.
    params.n_ctx = options["num_slots"] * options["length"] + _SPARE
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options["threads"]
    # Errors only.
    params.port, params.verbosity = 0, 1
    params.api_keys, params.ui, params.cors_origins = [options["token"]], False, ""
    params.slot_save_path = options["states"].rstrip("/") + "/"
    params.endpoint_slots = True
    # Without flash attention, values are stored transposed.
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    # A saved state is of one stream, and only a unified cache has one.
    params.kv_unified = True
    # Otherwise a restored prefix is cleared again as soon as another slot begins.
    params.cache_idle_slots, params.cache_ram_mib = False, 0
    # Texts are never cut, and come token by token.
    params.ctx_shift, params.warmup = False, True
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    serve(json.loads(sys.stdin.readline()))
