"""What several commands need: the names of metrics, paths, scores as tables, and JSON on stdout."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from prefixtune.cli.options import PathText
from prefixtune.cli.show import print_event, print_json
from prefixtune.errors import ConfigError, did_you_mean
from prefixtune.utils.console import Console

__all__ = ["PathText", "check_metrics", "format_score", "print_event", "print_json", "show_scores"]


def check_metrics(names: Iterable[str], known: Collection[str]) -> None:
    """Refuse unknown metrics, all at once.

    Raises:
        ConfigError: One is unknown.
    """
    unknown = [name for name in names if name not in known]
    if unknown:
        listed = ", ".join(map(repr, unknown))
        hints = [did_you_mean(name, known) for name in unknown]
        raise ConfigError(f"there is no metric {listed} for this task.", hint=" ".join(dict.fromkeys(hints)))


def show_scores(console: Console, title: str, result: Mapping[str, Any], counted: str) -> None:
    """Print the scores of an evaluation, and those of its groups.

    Args:
        console: Where.
        title: Of the table of all scores.
        result: As `evaluation.records.summarize` makes it.
        counted: What the groups have so many of.
    """
    rows = [[name, format_score(score), score["implementation"]] for name, score in result["scores"].items()]
    console.table(title, ["metric", "score", "implementation"], rows, result=True)
    for grouping, groups in result.get("groups", {}).items():
        rows = [
            [group, f"{part['num_examples']:,}", *map(format_score, part["scores"].values())]
            for group, part in groups.items()
        ]
        names = list(next(iter(groups.values()))["scores"])
        console.table(f"by {grouping}", ["", counted, *names], rows, result=True)


def format_score(score: Mapping[str, Any]) -> str:
    """A score with two digits after the point on a scale of 100, otherwise four; and its interval."""
    value, interval = score["score"], score.get("interval")
    text = f"{value:.{2 if abs(value) >= 10 else 4}f}"
    return f"{text} [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else text
