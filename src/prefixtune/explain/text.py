"""The main figures of a view in a line or two, for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prefixtune.explain.page import name_of
from prefixtune.explain.pictures import span
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
        "likeness": _likeness,
        "start": _start,
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
        yield f"{'; '.join(sides)} (replaced by the {found['replaced_by']})"
    for what, parts in (("position", found["positions"]), ("layer", found["layers"])):
        if parts:
            worst = max(parts, key=lambda part: float(part["change"]))
            site = f" ({worst['site']})" if "site" in worst else ""
            which = f"{what} {span(worst['first'], worst['last'])}{site}"
            yield f"most is lost without {which}: {signed(worst['change'], 3)}"


def _nearest(found: Mapping[str, Any]) -> Iterator[str]:
    means = {"this prefix": found["mean_best"], **{name_of(k): v for k, v in found["controls"].items()}}
    for part in (part for part in ("keys", "values") if found["mean_best"][part] is not None):
        cosines = [f"{name} {fixed(each[part], 3)}" for name, each in means.items()]
        yield f"cosine of the nearest token by {part}: {'; '.join(cosines)}"
    first = [row["values"][0]["token"] for row in found["positions"][:12] if row["values"]]
    yield f"nearest by values: {' '.join(map(repr, first))}"


def _description(found: Mapping[str, Any]) -> Iterator[str]:
    for name in ("prefix", "bare"):
        said = found["descriptions"].get(name, {})
        for question, each in said.items():
            score = "" if each.get("faithfulness") is None else f" (faithfulness {fixed(each['faithfulness'], 2)})"
            yield f"{'with' if name == 'prefix' else 'without'}, {question.replace('_', ' ')}: {each['text']!r}{score}"


def _likeness(found: Mapping[str, Any]) -> Iterator[str]:
    for name, by_site in found["with"].items():
        for site, sides in by_site.items():
            parts = [
                f"{part} cosine {fixed(sides[part]['cosine'], 3)}, CKA {fixed(sides[part]['cka'], 3)}" for part in sides
            ]
            yield f"{name_of(name)} ({site}): {'; '.join(parts)}"


def _start(found: Mapping[str, Any]) -> Iterator[str]:
    for site in found["keys"]:
        parts = [
            f"{part} moved by {fixed(found[part][site]['moved'], 2)} of their length, cosine "
            f"{fixed(found[part][site]['cosine'], 3)}"
            for part in ("keys", "values")
        ]
        yield f"{site}, from {found['start']}: {'; '.join(parts)}"
