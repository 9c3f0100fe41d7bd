"""Lists in pages, as OpenAI's clients read them: `after` names the last item that is known, `limit` the most items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from fastapi import Request

from prefixtune.server.responses import bad_request

__all__ = ["ORDER", "PAGE", "Page", "list_body", "page_of", "parameter", "read_page", "unknown_after"]


def parameter(name: str, description: str, **schema: Any) -> dict[str, Any]:
    """A parameter of a query, for the document."""
    return {"name": name, "in": "query", "required": False, "description": description, "schema": schema}


PAGE = (
    parameter("after", "The id of the last item of the page before.", type="string"),
    parameter("limit", "Most items.", type="integer", minimum=1),
)
"""The parameters of a page, for the document."""
ORDER = parameter("order", "Of their creation.", enum=["asc", "desc"], default="desc")


class Page(NamedTuple):
    """Which part of a list is wanted.

    Attributes:
        limit: Most items.
        after: The id of the item before the first one; empty: from the beginning.
        order: Of their creation.
    """

    limit: int
    after: str = ""
    order: Literal["asc", "desc"] = "desc"


def read_page(request: Request, *, default: int = 20, largest: int = 100) -> Page:
    """What the query of a request says.

    Raises:
        ApiError: 400: a parameter is wrong.
    """
    query = request.query_params
    limit, order = query.get("limit", str(default)), query.get("order", "desc")
    if not (limit.isascii() and limit.isdigit() and len(limit) < 10 and 1 <= int(limit) <= largest):
        raise bad_request(f"limit is {limit[:40]!r}, but must be a whole number between 1 and {largest}.", "limit")
    if order not in ("asc", "desc"):
        raise bad_request(f"order is {order[:40]!r}, but must be asc or desc.", "order")
    return Page(int(limit), query.get("after", ""), "asc" if order == "asc" else "desc")


def page_of(items: Sequence[dict[str, Any]], page: Page) -> dict[str, Any]:
    """The page of a whole list, which is in the wanted order.

    Raises:
        ApiError: 400: `after` names none of the items.
    """
    start = 0
    if page.after:
        ids = [item["id"] for item in items]
        if page.after not in ids:
            raise unknown_after(page)
        start = ids.index(page.after) + 1
    return list_body(items[start : start + page.limit], has_more=len(items) > start + page.limit)


def unknown_after(page: Page) -> Exception:
    """400: `after` names no item of the list."""
    return bad_request(f"after is {page.after[:80]!r}, which is not in this list.", "after")


def list_body(items: Sequence[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """A page as clients read it."""
    ids = [item["id"] for item in items] or [None]
    return {"object": "list", "data": list(items), "first_id": ids[0], "last_id": ids[-1], "has_more": has_more}
