"""The fixtures of a small document."""

from small_document import backbone, write_rows

__all__ = ["backbone", "write_rows"]
