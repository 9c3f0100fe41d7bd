"""The fixtures of a small document."""

from small_document import backbone, options, unanswered, write_rows

__all__ = ["backbone", "options", "unanswered", "write_rows"]
