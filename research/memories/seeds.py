"""Several seeds of `joined` beside each other: means over seeds, with 95 % intervals over documents.

    python -m research.memories.seeds RESULT.json ...

An interval is Student's t over the documents, each with its mean over the seeds: what another document of this kind
would give. A share kept is joined divided by alone, of each document.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scipy import stats

_MEASURED = ("alone", "another", "joined")


def interval(values: list[float]) -> tuple[float, float, float]:
    """The mean of some documents' values, and the ends of its interval.

    >>> [round(value, 2) for value in interval([0.7, 0.8, 0.9])]
    [0.8, 0.55, 1.05]
    """
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval()
    return statistics.fmean(values), low, high


def table(results: list[dict[str, Any]]) -> Iterator[str]:
    """What was measured with each seed, and over all, as Markdown."""
    results = sorted(results, key=lambda result: int(result["options"]["seed"]))
    rows = {name: [one[name]["documents"] for one in results] for name in results[0] if name.startswith(_MEASURED)}
    rows["kept"] = [
        [joined / alone for joined, alone in zip(own, first, strict=True)]
        for own, first in zip(list(rows.values())[-1], rows["alone"], strict=True)
    ]
    yield f"| per cent | {' | '.join('seed ' + str(one['options']['seed']) for one in results)} | all | 95 % interval |"
    yield f"|---{'|---' * len(results)}|---|---|"
    for name, seeds in rows.items():
        # A document's share is that of its means, as single runs have few questions.
        by_document = [statistics.fmean(values) for values in zip(*seeds, strict=True)]
        mean, low, high = (100 * value for value in interval(by_document))
        cells = " | ".join(f"{100 * statistics.fmean(own):.1f}" for own in seeds)
        yield f"| {name} | {cells} | {mean:.1f} | {low:.1f} to {min(high, 100):.1f} |"


def main() -> None:
    """Print the table."""
    paths = sys.argv[1:] or sys.exit(__doc__)
    print("\n".join(table([json.loads(Path(path).read_text()) for path in paths])))


if __name__ == "__main__":
    main()
