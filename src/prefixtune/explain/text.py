"""The main figures of a view in a line or two, for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prefixtune.explain.page import name_of, span
from prefixtune.explain.view import View
from prefixtune.pages.format import fixed, signed

__all__ = ["lines"]


def lines(view: View) -> list[str]:
    """What a view found, in short; or why it is left out."""
    if view.left_out:
        return [f"left out: {view.left_out}"]
    write: Mapping[str, Callable[[Mapping[str, Any]], Iterator[str]]] = {
        "attention": _attention,
        "loss": _loss,
        "nearest": _nearest,
        "description": _description,
    }
    return [*write[view.name](view.numbers), *view.notes]


def _attention(found: Mapping[str, Any]) -> Iterator[str]:
    for site, mass in found["sites"].items():
        controls = [f"{name_of(n)} {by[site]['total']:.1%}" for n, by in found["controls"].items() if site in by]
        without = f" ({mass['total_without_first']:.1%} without its first position)"
        yield f"{site}: {mass['total']:.1%} of the attention goes to the prefix{without}; {'; '.join(controls)}"


def _loss(found: Mapping[str, Any]) -> Iterator[str]:
    controls = [f"{name_of(name)} {fixed(each['loss'], 3)}" for name, each in found["controls"].items()]
    bare = found["without_prefix"]["loss"]
    yield f"loss {fixed(found['whole']['loss'], 3)}; without {fixed(bare, 3)}; {'; '.join(controls)}"
    sides = [
        f"without its own {name} {signed(found[name]['change'], 3)}" for name in ("keys", "values") if name in found
    ]
    if sides:
        yield f"{'; '.join(sides)} (replaced by their mean)"
    for what, parts in (("position", found["positions"]), ("layer", found["layers"])):
        if parts:
            worst = max(parts, key=lambda part: float(part["change"]))
            site = f" ({worst['site']})" if "site" in worst else ""
            which = f"{what} {span(worst['first'], worst['last'])}{site}"
            yield f"most is lost without {which}: {signed(worst['change'], 3)}"


def _nearest(found: Mapping[str, Any]) -> Iterator[str]:
    means = {"this prefix": found["mean_best"], **{name_of(name): each for name, each in found["controls"].items()}}
    yield f"cosine of the nearest token by values: {'; '.join(f'{name} {fixed(v, 3)}' for name, v in means.items())}"
    first = [row["nearest"][0]["token"] for row in found["positions"][:12] if row["nearest"]]
    yield f"nearest: {' '.join(map(repr, first))}"


def _description(found: Mapping[str, Any]) -> Iterator[str]:
    for name in ("prefix", "bare"):
        said = found["descriptions"].get(name, {})
        for question, each in said.items():
            score = "" if each.get("faithfulness") is None else f" (faithfulness {fixed(each['faithfulness'], 2)})"
            yield f"{'with' if name == 'prefix' else 'without'}, {question.replace('_', ' ')}: {each['text']!r}{score}"
