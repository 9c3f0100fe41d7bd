"""A short mixed load on a server with a tiny model; `make stress` does the same for longer.

Slow: the load lasts some seconds.
"""

from stress.load import put_load


def test_a_mixed_load_has_no_fault_and_fair_shares(tmp_path):
    tally = put_load(tmp_path, seconds=3, prefixes=20, connections=16)
    assert tally.faults == []
    assert sum(tally.done.values()) > 25
    assert tally.left > 0
    # Six times the connections, and about the same share; less where other work keeps the callers from asking.
    assert not tally.busy
    shares = [tally.tokens[name] for name in ("heavy", "light", "other")]
    assert min(shares) > 0.4 * max(shares), tally
