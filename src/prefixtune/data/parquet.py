"""Rows of a Parquet file, through the optional library pyarrow, which the extra `datasets` brings.

Knows nothing of what a row means: no task, no column name.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefixtune.errors import ConfigError, DataError

__all__ = ["parquet_rows"]


def parquet_rows(data: bytes, path: Path, most_bytes: int) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file that was read whole, as JSON values where there are such.

    Args:
        data: The file's bytes.
        path: Where they are from, for messages.
        most_bytes: Of the columns, once they are decompressed.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: The file is no whole Parquet file, or has more than `most_bytes`.
    """
    try:
        arrow, parquet = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
    except ImportError as error:
        raise ConfigError(
            f"{path}: reading Parquet needs the library pyarrow, which is not installed.",
            hint="pip install 'prefixtune[datasets]', or export the table as JSON lines.",
        ) from error
    try:
        with parquet.ParquetFile(arrow.BufferReader(data)) as file:
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            size = sum(group.total_byte_size for group in groups)
            if not 0 <= size <= most_bytes:
                raise DataError(
                    f"{path} has {size:,} bytes of columns; at most {most_bytes:,} are read.", hint="split the file."
                )
            # Batch by batch: all rows as Python objects at once take many times the file's size.
            for batch in file.iter_batches(batch_size=1024):
                yield from ({name: _plain(value) for name, value in row.items()} for row in batch.to_pylist())
    except DataError:
        raise
    except Exception as error:  # the library raises many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise DataError(f"{path} is no whole Parquet file: {reason}.", hint="copy or export it again.") from error


def _plain(value: Any) -> Any:
    """A value as JSON has it: dates, times and decimal numbers become texts."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)
