"""Measure training over HTTP on a real server, as one's own users meet it.

    python -m bench.serving.jobs                 # all parts; a quarter of an hour on two cores
    python -m bench.serving.jobs --parts first   # one of: first, together, served, memory
    python -m bench.serving.jobs --quick         # only to see that it works

first: fifty examples (messages, and the department that each is for), from the upload to the first right answer by the
new name. together: eight such jobs at once, against one after the other, with the same steps. served: tokens per second
of eight streams at a time while a job trains, against without one, in alternation, and the longest gap between two
pieces of one stream from the start of training to the publishing of its result. memory: what server and worker hold
while a job trains, against the server before (PSS: pages that both map count once).

Every part speaks through the unmodified OpenAI client or plain HTTP; nothing is called inside the server.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx2
import openai
import psutil

from bench.results import FOLDER, Figure, Log, PeerError, Results, run_benchmark
from bench.serving.load import Server
from prefixtune.data.toy.classification import make_toy_labels

PARTS = ("first", "together", "served", "memory")
EXAMPLES, JOBS, STREAMS = 50, 8, 8
PATIENCE = 1200.0
"""Seconds that a job may take."""
PROMPT = "Once upon a time there was a small lighthouse, and in it"


@dataclass
class Side:
    """A server and its clients."""

    server: Server
    client: openai.OpenAI

    @property
    def backbone(self) -> str:
        """The bare model's name."""
        return self.client.models.list().data[0].id

    def upload(self, rows: Sequence[dict[str, str]], name: str = "train.jsonl") -> str:
        """Upload examples; returns the file's id."""
        text = "".join(json.dumps(row) + "\n" for row in rows)
        file = self.client.files.create(file=(name, io.BytesIO(text.encode())), purpose="fine-tune")
        if file.status != "processed":
            raise PeerError(f"the upload is {file.status}: {file.status_details}")
        return file.id

    def start(self, file: str, **options: Any) -> str:
        """Ask for a job; returns its id."""
        return self.client.fine_tuning.jobs.create(training_file=file, model=self.backbone, **options).id

    def wait(self, job: str, pause: float = 0.2) -> Any:
        """The job, once it has succeeded."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            state = self.client.fine_tuning.jobs.retrieve(job)
            if state.status == "succeeded":
                return state
            if state.status not in ("queued", "running"):
                raise PeerError(f"a job is {state.status}: {state.error}")
            time.sleep(pause)
        raise PeerError(f"a job took more than {PATIENCE:g} seconds")


@contextlib.contextmanager
def serving(backbone: str, log: Log) -> Iterator[Side]:
    """A server in an empty folder."""
    with tempfile.TemporaryDirectory(prefix="prefixtune-bench-") as root:
        folder = Path(root)
        (folder / "prefixes").mkdir()
        command = [sys.executable, "-m", "prefixtune", "serve", "--data-folder", str(folder / "data")]
        log("starting a server ...")
        server = Server(command, backbone, folder, {}, 32, 256, dtype="auto")
        try:
            server.wait(300)
            yield Side(server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600))
        finally:
            server.stop()


def examples(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Messages and their departments: to train on, and to ask afterwards."""
    sets = make_toy_labels(seed=seed, train=2 * EXAMPLES, held_out=20)
    train, held_out = ([{"prompt": row.source, "completion": row.targets[0]} for row in rows] for rows in sets)
    return train[:EXAMPLES], held_out


# --- parts ------------------------------------------------------------------------------------------------------------


def first_answer(side: Side, options: argparse.Namespace, log: Log) -> Results:
    """From the upload to the first right answer, by a worker that has to start and by one that is there."""
    seconds: dict[str, float] = {}
    shares: dict[str, float] = {}
    for seed, kind in enumerate(("worker starts", "worker runs")):
        train, held_out = examples(seed)
        began = time.monotonic()
        job = side.wait(side.start(side.upload(train), suffix="first", **_short(options)))
        right = 0
        for row in held_out:
            if _answer(side, job.fine_tuned_model, row["prompt"]) == row["completion"]:
                right += 1
                seconds.setdefault(kind, time.monotonic() - began)
        shares[kind] = right / len(held_out)
        log(
            f"{kind}: first right answer after {seconds.get(kind, float('nan')):.1f} s, "
            f"{right} of {len(held_out)} right"
        )
        if kind not in seconds and not options.quick:
            raise PeerError("no answer was right")
    bare = _share(side, side.backbone, held_out)
    figures = [
        Figure("first", f"first right answer, {kind}", value, "s", at_most=60.0) for kind, value in seconds.items()
    ]
    figures += [Figure("first", f"right answers, {kind}", value) for kind, value in shares.items()]
    return {"seconds": seconds, "right": shares, "right_bare": bare}, [
        *figures,
        Figure("first", "of the bare model", bare),
    ]


def _answer(side: Side, model: str, prompt: str) -> str:
    text = side.client.completions.create(model=model, prompt=prompt, max_tokens=12, temperature=0).choices[0].text
    return str(text).strip()


def _share(side: Side, model: str, rows: Sequence[dict[str, str]]) -> float:
    return sum(_answer(side, model, row["prompt"]) == row["completion"] for row in rows) / len(rows)


def together(side: Side, options: argparse.Namespace, log: Log) -> Results:
    """Jobs at once against one after the other; the same files, steps and seeds, by a worker that is there."""
    files = [side.upload(examples(10 + index)[0]) for index in range(JOBS)]
    side.wait(side.start(files[0], suffix="warm", hyperparameters={"n_epochs": 1}))
    epochs = 1 if options.quick else 3

    def begin(index: int, name: str) -> str:
        return side.start(files[index], suffix=name, seed=index, hyperparameters={"n_epochs": epochs})

    alone, began = [], time.monotonic()
    for index in range(JOBS):
        alone.append(side.wait(begin(index, "alone")))
    one_by_one = time.monotonic() - began
    log(f"{JOBS} jobs one after the other: {one_by_one:.1f} s")
    began = time.monotonic()
    company = [side.wait(job) for job in [begin(index, "company") for index in range(JOBS)]]
    at_once = time.monotonic() - began
    log(f"{JOBS} jobs at once: {at_once:.1f} s")
    tokens = [[job.trained_tokens for job in jobs] for jobs in (alone, company)]
    if tokens[0] != tokens[1]:
        raise PeerError(f"the jobs trained on unequal numbers of tokens: {tokens}")
    ratio = one_by_one / at_once
    values = {"one_after_the_other": one_by_one, "at_once": at_once, "trained_tokens": tokens[0], "epochs": epochs}
    return values, [Figure("together", f"{JOBS} jobs at once, speed against one by one", ratio, "x", at_least=2.5)]


@dataclass
class Streams:
    """What some streams of the server give, one after the other in each of some threads.

    Attributes:
        pieces: When each piece came, and in which stream.
    """

    url: str
    model: str
    pieces: list[tuple[float, int]] = field(default_factory=list)
    gaps: list[tuple[float, float]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Streams:
        self._threads = [threading.Thread(target=self._run, args=(index,)) for index in range(STREAMS)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, index: int) -> None:
        body = {"model": self.model, "prompt": PROMPT, "max_tokens": 256, "temperature": 0.8, "stream": True}
        with httpx2.Client(timeout=120) as client:
            while not self._stop.is_set():
                body["seed"] = len(self.pieces)
                try:
                    self._read(client, body, index)
                except httpx2.HTTPError as error:
                    self.faults.append(f"{type(error).__name__}: {error}")
                    return

    def _read(self, client: httpx2.Client, body: dict[str, Any], index: int) -> None:
        last = None
        with client.stream("POST", f"{self.url}/v1/completions", json=body) as response:
            if response.status_code != 200:
                self.faults.append(response.read().decode()[:300])
                self._stop.set()
                return
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                now = time.monotonic()
                self.pieces.append((now, index))
                if last is not None:
                    self.gaps.append((now, now - last))
                last = now
                if self._stop.is_set():
                    return

    def rate(self, began: float, ended: float) -> float:
        """Pieces per second, of all streams, between two times."""
        return sum(began <= when < ended for when, _ in self.pieces) / (ended - began)

    def longest_gap(self, began: float, ended: float) -> float:
        """The longest time between two pieces of one stream, between two times."""
        return max((gap for when, gap in self.gaps if began <= when < ended), default=float("nan"))


def served(side: Side, options: argparse.Namespace, log: Log) -> Results:
    """What the server still gives while a job trains, in rounds: alone, then with a job from its start to its end."""
    rounds, window = (1, 5.0) if options.quick else (3, 20.0)
    rates: list[tuple[float, float]] = []
    gaps: list[tuple[float, float]] = []
    file = side.upload(examples(30)[0])
    with Streams(side.server.url, side.backbone) as streams:
        time.sleep(3 if options.quick else 10)
        for index in range(rounds):
            began = time.monotonic()
            time.sleep(window)
            alone = streams.rate(began, time.monotonic())
            quiet = streams.longest_gap(began, time.monotonic())
            began = time.monotonic()
            job = side.start(file, suffix=f"served{index}", hyperparameters={"n_epochs": 1 if options.quick else 2})
            _wait_until_running(side, job)
            trains = time.monotonic()
            side.wait(job, pause=1.0)
            ended = time.monotonic()
            time.sleep(1)
            rates.append((alone, streams.rate(trains, ended)))
            gaps.append((quiet, streams.longest_gap(began, time.monotonic())))
            log(f"round {index + 1}: {alone:.0f}, {rates[-1][1]:.0f} tokens/s; longest gap {gaps[-1][1]:.2f} s")
            if streams.faults:
                raise PeerError(streams.faults[0])
    ratios = [training / alone for alone, training in rates]
    worst = max(gap for _, gap in gaps)
    values = {"tokens_per_second": rates, "longest_gaps": gaps, "streams": STREAMS}
    return values, [
        Figure("served", "tokens/s while a job trains, against without", median(ratios), "x", at_least=0.7),
        Figure("served", "longest gap in a stream, from start to publishing", worst, "s", at_most=1.0),
        Figure("served", "longest gap in a stream, without training", max(gap for gap, _ in gaps), "s"),
    ]


def _wait_until_running(side: Side, job: str) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if any(event.type == "metrics" for event in side.client.fine_tuning.jobs.list_events(job, limit=5).data):
            return
        time.sleep(0.2)


def memory(side: Side, options: argparse.Namespace, log: Log) -> Results:
    """PSS of the server before any worker, and of both at the worker's highest."""
    _answer(side, side.backbone, PROMPT)
    process = psutil.Process(side.server.process.pid)
    before, _ = _pss(process)
    job = side.start(side.upload(examples(40)[0]), suffix="memory", **_short(options))
    highest, end = (before, 0.0), time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with contextlib.suppress(psutil.Error):
            highest = max(highest, _pss(process), key=sum)
        if side.client.fine_tuning.jobs.retrieve(job).status not in ("queued", "running"):
            break
        time.sleep(0.5)
    side.wait(job)
    server, worker = highest
    log(f"{before:.0f} MiB before; with a worker that trains {server:.0f} and {worker:.0f} MiB")
    values = {"server_before_mib": before, "server_mib": server, "worker_mib": worker}
    return values, [Figure("memory", "server and worker against the server", sum(highest) / before, "x", at_most=1.6)]


def _pss(process: psutil.Process) -> tuple[float, float]:
    """MiB of a server, and of its worker; what both map counts half for each."""
    children = process.children(recursive=True)
    server, *workers = (one.memory_full_info().pss / 2**20 for one in [process, *children])
    return float(server), float(sum(workers))


def _short(options: argparse.Namespace) -> dict[str, Any]:
    return {"hyperparameters": {"n_epochs": 1}} if options.quick else {}


# --- all of it --------------------------------------------------------------------------------------------------------

_MEASURES: dict[str, Callable[[Side, argparse.Namespace, Log], Results]] = {
    "first": first_answer,
    "together": together,
    "served": served,
    "memory": memory,
}


def measure(options: argparse.Namespace, log: Log) -> Results:
    """All parts, each on a server of its own."""
    values: dict[str, Any] = {"examples": EXAMPLES}
    figures: list[Figure] = []
    for part in options.parts:
        with serving(options.backbone, log) as side:
            values[part], lines = _MEASURES[part](side, options, log)
        figures += lines
    return values, figures


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--parts", default=",".join(PARTS), help="which, with commas between (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it works; no figure counts")
    parser.add_argument("--backbone", default="smollm2-135m", help="name, hub id or folder (default %(default)s)")
    parser.add_argument("--json", type=Path, default=FOLDER / "jobs.json", help="where the figures go")
    options = parser.parse_args()
    options.parts, options.repeats = options.parts.split(","), 1
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"--parts {', '.join(sorted(unknown))}: known are {', '.join(PARTS)}")
    return options


def main() -> int:
    """Measure, print, and write the figures."""
    options = parse()
    return run_benchmark(options, lambda console: measure(options, console.info))


if __name__ == "__main__":
    sys.exit(main())
