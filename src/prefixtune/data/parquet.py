"""Rows of a Parquet file, read with pyarrow, which the extra `datasets` installs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefixtune.errors import DataError
from prefixtune.utils.extras import needs_extra

__all__ = ["parquet_rows"]


def parquet_rows(data: bytes, path: Path, max_bytes: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row's location, for messages, and its values by column, as JSON values where possible.

    Args:
        data: The file's bytes.
        path: The file, for messages.
        max_bytes: Most bytes of the columns, after decompression.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: The file is not a complete Parquet file, or has more than `max_bytes`.
    """
    with needs_extra("datasets", f"{path}: reading Parquet", ", or export the table as JSON lines"):
        import pyarrow as arrow
        from pyarrow import parquet
    try:
        with parquet.ParquetFile(arrow.BufferReader(data)) as file:
            groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
            size = sum(group.total_byte_size for group in groups)
            if not 0 <= size <= max_bytes:
                raise DataError(
                    f"{path} has {size:,} bytes of columns; at most {max_bytes:,} are read.", hint="split the file."
                )
            # Batch by batch, because all rows at once as Python objects take many times the file's size.
            rows = (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield f"{path}, row {number}", {name: _as_json(value) for name, value in row.items()}
    except DataError:
        raise
    except Exception as error:  # the library raises many types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise DataError(f"{path} is not a complete Parquet file: {reason}.", hint="copy or export it again.") from error


def _as_json(value: Any) -> Any:
    """A value as in JSON: dates, times and decimal numbers become texts."""
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _as_json(item) for key, item in value.items()}
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)
