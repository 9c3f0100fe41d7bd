"""The log: one JSON object a line, on stdout.

Knows nothing of requests; who writes a line decides what it says.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

__all__ = ["log", "set_up_logs"]

_LOG = logging.getLogger("prefixtune.server")


def log(event: str, *, level: int = logging.INFO, error: BaseException | None = None, **facts: Any) -> None:
    """Write a line.

    Args:
        event: What happened, in a word.
        level: How bad it is.
        error: An error that nobody foresaw; its traceback is written.
        **facts: What there is to know of it.
    """
    _LOG.log(level, event, extra={"facts": facts}, exc_info=error)


def set_up_logs(level: str) -> None:
    """Write what this process logs as JSON lines, from a level on."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_JsonLines())
    # uvicorn's and the engine's too; other libraries only speak up when something is wrong.
    for name, lowest in (("prefixtune", level), ("uvicorn", "warning"), ("asyncio", "warning")):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(max(logging.getLevelNamesMapping()[each.upper()] for each in (level, lowest)))


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """A record as one line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info and record.exc_info[1]:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str).encode("utf-8", "replace").decode()
