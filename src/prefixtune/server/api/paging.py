"""Lists in pages, as OpenAI's clients read them: `after` names the last item that is known, `limit` the most items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Query

from prefixtune.server.responses import ApiError, bad_request

After = Annotated[str, Query(description="The id of the last item of the page before.")]
Limit = Annotated[int, Query(ge=1, le=100, description="Most items.")]


def page_of(items: Sequence[dict[str, Any]], after: str, limit: int) -> dict[str, Any]:
    """The page of a whole list, which is in the wanted order.

    Raises:
        ApiError: 400: `after` names none of the items.
    """
    start = 0
    if after:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise unknown_after(after)
        start = ids.index(after) + 1
    return list_body(items[start : start + limit], has_more=len(items) > start + limit)


def unknown_after(after: str) -> ApiError:
    """400: `after` names no item of the list."""
    return bad_request(f"after is {after[:80]!r}, which is not in this list.", "after")


def list_body(items: Sequence[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """A page as clients read it."""
    ids = [item["id"] for item in items] or [None]
    return {"object": "list", "data": list(items), "first_id": ids[0], "last_id": ids[-1], "has_more": has_more}
