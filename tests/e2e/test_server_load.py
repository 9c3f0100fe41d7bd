"""A short version of `bench/load.py` on a tiny model: tenants, streams, uploads and clients that leave, all at once."""

from __future__ import annotations

import sys
from pathlib import Path

from live_server import COMMAND, make_model

sys.path[:0] = [str(Path(__file__).parents[2] / "bench"), str(Path(__file__).parents[2] / "bench" / "serving")]
from load import put_load  # noqa: E402


def test_a_mixed_load_has_no_fault_and_fair_shares(tmp_path: Path) -> None:
    model = make_model(tmp_path / "tiny")
    command = [sys.executable, "-c", COMMAND]
    figures, tally = put_load(
        command, str(model), seconds=6, prefixes=20, connections=16, tell=lambda text: None, length=4, slots=4, queue=80
    )
    assert tally.faults == []
    assert figures["calls"] > 50
    assert tally.left > 0
    assert tally.replaced > 0
    # Six times the connections, and about the same share; less where other work keeps the callers from asking.
    assert figures["busy"].keys() == {"heavy"}
    assert figures["least_share"] > 0.4, figures
