"""Values of tables that have types of their own (Parquet, sets of the `datasets` library) -> values as in JSON."""

from __future__ import annotations

from typing import Any

__all__ = ["as_json"]


def as_json(value: Any) -> Any:
    """A value as in JSON: dates, times and decimal numbers become texts, and so do bytes that are UTF-8.

    Hive, Impala and older versions of Spark write texts as bytes. Others, such as images, stay bytes, which are refused
    where a text is needed.

    >>> from datetime import date
    >>> as_json([date(2026, 1, 2), b"a", 1.5])
    ['2026-01-02', 'a', 1.5]
    """
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)
