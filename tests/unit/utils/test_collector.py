"""What the garbage collector looks at."""

from __future__ import annotations

import gc

from prefixtune.utils.collector import keeping_objects


def test_objects_are_kept_while_a_block_runs() -> None:
    assert gc.get_freeze_count() == 0
    with keeping_objects():
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0
