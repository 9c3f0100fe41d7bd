"""A short run of `bench.serving.load` on a tiny model: tenants, streams, uploads and clients that leave, at once."""

from __future__ import annotations

import sys
from pathlib import Path

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
