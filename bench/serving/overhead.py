"""Measure what the server itself costs, with an instant engine: milliseconds per request and per streamed token.

    python -m bench.serving.overhead                         # this version alone, a minute
    python -m bench.serving.overhead --vs OTHER/src          # and another one, in turn in the same run
    python -m bench.serving.overhead --vs src                # against itself: how much the figures vary

Each version runs in a process of its own (`bench.serving.instant_server`): its real application and uvicorn, a real
backbone and prefix, and an engine whose tokens are there at once. The client sends ready-made bytes on an open
connection, so nearly all of the time is the server's: reading, validating, tokenizing, passing tokens on, writing. The
sides take turns, A B, B A, ...; a difference is the median of the paired differences, with its quartiles in brackets.
Processor time is steadier than time where other programs run.

Needs `prefixtune prepare` once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import psutil

import prefixtune
from bench.results import FOLDER, Figure, Log, PeerError, Results, run_benchmark
from prefixtune.backbone.load import DEFAULT_BACKBONE, load_backbone
from prefixtune.backbone.prefixes import make_header
from prefixtune.prefix.artifact import save_prefix
from prefixtune.prefix.prefix import Prefix
from prefixtune.training.starts.words import from_words

ROOT = Path(__file__).resolve().parents[2]
SOURCE = "name : The Vaults | Type : pub | price : more than £ 30 | area : riverside | near : Café Adriatic"
SHORT, LONG = 1, 257
"""Tokens of the two streams whose difference is the cost of a token."""
AT_ONCE = 8
"""Connections whose requests are open at the same time, for the requests per second."""
MS_PER_REQUEST, MS_PER_TOKEN = 0.5, 0.005
FULL, QUICK = (200, 20), (10, 2)
"""Requests and streams of each kind in a round."""

_COMPLETIONS, _CHATS = "/v1/completions", "/v1/chat/completions"
_COMPLETION = {"model": "p", "prompt": SOURCE, "max_tokens": 8, "temperature": 0}
_CHAT = {"model": "p", "messages": [{"role": "user", "content": SOURCE}], "max_tokens": 8, "temperature": 0}
_MORE_FIELDS = {
    "min_tokens": 1,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 40,
    "seed": 7,
    "n": 1,
    "stop": ["\n\n", "###"],
    "repetition_penalty": 1.1,
    "user": "u",
    "metadata": {"a": "b"},
    "presence_penalty": 0,
}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": (_COMPLETIONS, _COMPLETION),
    "completion, 14 fields": (_COMPLETIONS, {**_COMPLETION, **_MORE_FIELDS}),
    "completion, 400 token ids": (_COMPLETIONS, {**_COMPLETION, "prompt": list(range(1, 101)) * 4}),
    "chat": (_CHATS, _CHAT),
    "task": ("/v1/tasks/p", {"source": SOURCE, "max_tokens": 8}),
    "wrong request": (_COMPLETIONS, {**_COMPLETION, "max_token": 8}),
}


def stream_name(kind: str, tokens: int) -> str:
    """The name of a stream of so many tokens."""
    return f"{kind}, stream of {tokens}"


STREAMS = {
    stream_name(kind, tokens): (path, {**body, "max_tokens": tokens, "stream": True})
    for kind, (path, body) in REQUESTS.items()
    if kind in ("completion", "chat")
    for tokens in (SHORT, LONG)
}


@dataclass
class Timing:
    """Seconds of one side, one value for each round.

    Attributes:
        wall: Kind of request -> seconds for one, alone on one connection.
        cpu: Kind of request -> seconds of processor time for one.
        at_once: Seconds for a completion while others are open.
    """

    wall: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)
    at_once: list[float] = field(default_factory=list)


class InstantServer:
    """A version of the server in a process of its own.

    Args:
        sources: Folder with the package `prefixtune`.
        backbone: As for `prefixtune serve`.
        prefixes: The folder of prefixes.
        log: Where its output goes.

    Raises:
        PeerError: It does not start.
    """

    def __init__(self, sources: Path, backbone: str, prefixes: Path, log: Path) -> None:
        options = ["--backbone", backbone, "--prefixes", str(prefixes), "--port", "0", "--dtype", "float32"]
        path = os.pathsep.join((str(sources), str(ROOT)))
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "bench.serving.instant_server",
                    str(sources),
                    *options,
                    "--log-level",
                    "warning",
                ],
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.address = self._wait(log)

    def _wait(self, log: Path, seconds: float = 120) -> tuple[str, int]:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            _, separator, rest = log.read_text(encoding="utf-8", errors="replace").partition(" on http://")
            host, _, port = rest.partition(" ")[0].strip().partition(":")
            if separator and port.isdigit():
                with contextlib.suppress(OSError):
                    socket.create_connection((host, int(port)), timeout=1).close()
                    return host, int(port)
            time.sleep(0.05)
        self.close()
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise PeerError(lines[-1] if lines else "the server did not start")

    def cpu_seconds(self) -> float:
        """Processor time used so far."""
        # In nanoseconds on Linux; elsewhere the clock ticks a hundred times a second.
        threads = list(Path(f"/proc/{self.process.pid}/task").glob("*/schedstat"))
        if threads:
            return sum(int(thread.read_text(encoding="ascii").split()[0]) for thread in threads) / 1e9
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    @contextlib.contextmanager
    def connections(self, count: int) -> Iterator[list[Connection]]:
        """Open connections."""
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(contextlib.closing(Connection(self.address))) for _ in range(count)]

    def close(self) -> None:
        """Stop it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Connection:
    """A connection that stays open from request to request."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address, timeout=60)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, request: bytes) -> None:
        """Send a request."""
        self.socket.sendall(request)

    def receive(self) -> bytes:
        """The response: its header, and a body by its length or in chunks."""
        received = b""
        while b"\r\n\r\n" not in received:
            received += self._read()
        head, _, body = received.partition(b"\r\n\r\n")
        _, has_length, rest = head.lower().partition(b"content-length: ")
        if has_length:
            missing = int(rest.partition(b"\r\n")[0]) - len(body)
            while missing > 0:
                data = self._read()
                missing, received = missing - len(data), received + data
            return received
        parts = [received]
        while not parts[-1].endswith(b"0\r\n\r\n"):
            parts.append(self._read())
        return b"".join(parts)

    def _read(self) -> bytes:
        data = self.socket.recv(1 << 20)
        if not data:
            raise PeerError("the server closed a connection")
        return data

    def close(self) -> None:
        """Close it."""
        self.socket.close()


def request_bytes(path: str, body: Mapping[str, Any]) -> bytes:
    """A request as it is sent."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def seconds_per_request(connections: Sequence[Connection], request: bytes, count: int) -> float:
    """Seconds for one of `count` requests; each connection has one open at a time."""
    began = time.perf_counter()
    for _ in range(count // len(connections)):
        for connection in connections:
            connection.send(request)
        for connection in connections:
            connection.receive()
    return (time.perf_counter() - began) / (count // len(connections) * len(connections))


def check_responses(server: InstantServer) -> None:
    """Every kind of request is answered as it should be.

    Raises:
        PeerError: One is not.
    """
    with server.connections(1) as (connection,):
        for name, (path, body) in {**REQUESTS, **STREAMS}.items():
            connection.send(request_bytes(path, body))
            response = connection.receive()
            status = b" 400 " if name == "wrong request" else b" 200 "
            if status not in response[:16] or ("stream" in body and b"[DONE]" not in response):
                raise PeerError(f"{name}: {response[-300:].decode(errors='replace')}")


def measure_round(server: InstantServer, timing: Timing, requests: int, streams: int) -> None:
    """Add one value to everything that is timed."""
    with server.connections(AT_ONCE) as connections:
        for name, (path, body) in {**REQUESTS, **STREAMS}.items():
            count = requests if name in REQUESTS else streams
            data, before = request_bytes(path, body), server.cpu_seconds()
            timing.wall.setdefault(name, []).append(seconds_per_request(connections[:1], data, count))
            timing.cpu.setdefault(name, []).append((server.cpu_seconds() - before) / count)
        data = request_bytes(*REQUESTS["completion"])
        timing.at_once.append(seconds_per_request(connections, data, max(requests, AT_ONCE)))


def measure(options: argparse.Namespace, log: Log) -> Results:
    """All sides in turn."""
    requests, streams = QUICK if options.quick else FULL
    sources = {"this version": Path(prefixtune.__file__).resolve().parents[1]}
    if options.vs is not None:
        sources["the other version"] = options.vs.resolve()
    timings = {side: Timing() for side in sources}
    with tempfile.TemporaryDirectory(prefix="prefixtune-bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        make_prefix(options.backbone, folder / "prefixes")
        servers = {
            side: stack.enter_context(
                contextlib.closing(InstantServer(path, options.backbone, folder / "prefixes", folder / f"{side}.log"))
            )
            for side, path in sources.items()
        }
        for server in servers.values():
            check_responses(server)
        # The first round warms up.
        for server in servers.values():
            measure_round(server, Timing(), requests, streams)
        for index in range(options.repeats):
            for side in servers if index % 2 else reversed(servers):
                measure_round(servers[side], timings[side], requests, streams)
            log(f"  {index + 1}/{options.repeats}: " + ", ".join(_progress(side, one) for side, one in timings.items()))
    values = {
        "requests_per_round": requests,
        "streams_per_round": streams,
        "seconds": {side: vars(timing) for side, timing in timings.items()},
    }
    return values, [figure for side, timing in timings.items() for figure in _side(side, timing)] + (
        _differences(*timings.values()) if options.vs is not None else []
    )


def make_prefix(backbone_name: str, folder: Path) -> None:
    """The folder of prefixes, with the prefix `p`."""
    folder.mkdir()
    backbone = load_backbone(backbone_name, dtype="float32", device="cpu")
    text_format = {"prompt": " {source} {separator}", "target": " {target} "}
    header = make_header(backbone, task="records", text_format=text_format)
    save_prefix(folder / "p.safetensors", Prefix(from_words(backbone, "Describe the pub:", 10).layers, header))


def token_seconds(seconds: Mapping[str, Sequence[float]], kind: str) -> list[float]:
    """Seconds for one streamed token, by round."""
    pairs = zip(seconds[stream_name(kind, SHORT)], seconds[stream_name(kind, LONG)], strict=True)
    return [(long - short) / (LONG - SHORT) for short, long in pairs]


def _progress(side: str, timing: Timing) -> str:
    return f"{side} {1000 * timing.wall['completion'][-1]:.2f} ms"


def _side(side: str, timing: Timing) -> list[Figure]:
    """The table's lines of one side."""
    figures = [Figure(side, name, 1000 * median(timing.wall[name]), "ms") for name in REQUESTS]
    figures.append(Figure(side, f"completions, {AT_ONCE} at once", 1 / median(timing.at_once), "requests/s"))
    for kind in ("completion", "chat"):
        figures.append(Figure(side, f"{kind}, a streamed token", 1000 * median(token_seconds(timing.wall, kind)), "ms"))
    return figures


def _differences(this: Timing, other: Timing) -> list[Figure]:
    """The table's lines of the paired differences."""
    rates = [b / a for a, b in zip(this.at_once, other.at_once, strict=True)]
    figures = [Figure("this / other", f"completions, {AT_ONCE} at once, requests/s", median(rates), "x")]
    for clock, ours, theirs in (("time", this.wall, other.wall), ("processor time", this.cpu, other.cpu)):
        figures += [_difference(f"{name}, {clock}", ours[name], theirs[name], MS_PER_REQUEST) for name in REQUESTS]
        for kind in ("completion", "chat"):
            this_token, other_token = token_seconds(ours, kind), token_seconds(theirs, kind)
            figures.append(_difference(f"{kind}, a streamed token, {clock}", this_token, other_token, MS_PER_TOKEN))
    return figures


def _difference(name: str, this: Sequence[float], other: Sequence[float], at_most: float) -> Figure:
    pairs = [1000 * (a - b) for a, b in zip(this, other, strict=True)]
    low, _, high = quantiles(pairs, n=4, method="inclusive") if len(pairs) > 1 else pairs * 3
    return Figure("this - other", f"{name} ({low:+.4f} to {high:+.4f})", median(pairs), "ms", at_most=at_most)


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--vs", type=Path, metavar="SRC", help="folder with another version of the package")
    parser.add_argument("--repeats", type=int, help="timed rounds of each side (default 9; quick: 2)")
    parser.add_argument("--quick", action="store_true", help="a few requests, to see that it works; no figure counts")
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE, help="name, hub id or folder (default %(default)s)")
    parser.add_argument("--json", type=Path, default=FOLDER / "overhead.json", help="where the figures go")
    options = parser.parse_args()
    options.repeats = options.repeats or (2 if options.quick else 9)
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: at least 1 is needed")
    if options.vs is not None and not (options.vs / "prefixtune" / "__init__.py").is_file():
        parser.error(f"--vs {options.vs}: there is no package prefixtune in this folder")
    return options


def main() -> int:
    """Measure, print, and write the figures."""
    options = parse()
    return run_benchmark(options, lambda console: measure(options, console.info))


if __name__ == "__main__":
    sys.exit(main())
