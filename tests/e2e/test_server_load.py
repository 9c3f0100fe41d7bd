"""Short runs of the benchmarks of a server on a tiny model: mixed load, and the server's own cost."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import prefixtune
from bench.serving import overhead
from bench.serving.load import run_load
from live_server import COMMAND, make_model


def test_a_mixed_load_has_no_fault_and_fair_shares(tmp_path: Path) -> None:
    model = make_model(tmp_path / "tiny")
    command = [sys.executable, "-c", COMMAND]
    figures, tally = run_load(
        command, str(model), seconds=6, prefixes=20, connections=16, log=lambda text: None, length=4, slots=4, queue=80
    )
    assert tally.faults == []
    assert figures["calls"] > 50
    assert tally.left > 0
    assert tally.replaced > 0
    # Six times the connections, and about the same share; less where other work keeps the callers from asking.
    assert figures["busy"].keys() == {"heavy"}
    assert figures["least_share"] > 0.4, figures


def test_the_servers_own_cost_is_measured_beside_another_version(tmp_path: Path) -> None:
    sources = Path(prefixtune.__file__).parents[1]
    options = Namespace(quick=True, repeats=2, backbone=str(make_model(tmp_path / "tiny")), vs=sources)
    values, figures = overhead.measure(options, lambda text: None)
    assert [len(timing["wall"]["chat"]) for timing in values["seconds"].values()] == [2, 2]
    names = {figure.name.partition(" (")[0] for figure in figures if figure.part == "this - other"}
    assert names >= {f"{name}, {clock}" for name in overhead.REQUESTS for clock in ("time", "processor time")}
    assert all(seconds > 0 for timing in values["seconds"].values() for seconds in timing["cpu"]["completion"])
