"""Rows of a Parquet file, read with pyarrow, which the extra `datasets` installs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefixtune.data import streams
from prefixtune.data.parsing import check_names
from prefixtune.data.values import as_json
from prefixtune.errors import DataError, first_line
from prefixtune.utils.extras import needs_extra

__all__ = ["parquet_rows"]


def parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row's location, for messages, and its values by column, as JSON values where possible.

    Args:
        path: The file; gzipped if its name ends with `.gz`; or `-` for standard input.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: The file cannot be read, is not a complete Parquet file, names a column twice, or has too many bytes
            of columns in a group of rows or in all.
    """
    with needs_extra("datasets", f"{path}: reading Parquet", ", or export the table as JSON lines"):
        import pyarrow as arrow
        from pyarrow import parquet
    name = streams.shown(path)
    try:
        with streams.seekable_file(path) as data, parquet.ParquetFile(arrow.PythonFile(data, mode="r")) as file:
            check_names(file.schema_arrow.names, name)
            sizes = [file.metadata.row_group(index).total_byte_size for index in range(file.metadata.num_row_groups)]
            _check_size(max(sizes, default=0), streams.MAX_FILE_BYTES, f"a group of rows of {name}")
            _check_size(sum(sizes), streams.MAX_STREAM_BYTES, name)
            # Batch by batch, because all rows at once as Python objects take many times the file's size.
            rows = (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield f"{name}, row {number}", {column: as_json(value) for column, value in row.items()}
    except DataError:
        raise
    except Exception as error:  # the library raises many types
        reason = first_line(error).rstrip(".")
        raise DataError(f"{name} is not a complete Parquet file: {reason}.", hint="copy or export it again.") from error


def _check_size(size: int, limit: int, what: str) -> None:
    if not 0 <= size <= limit:
        raise DataError(
            f"{what} has {size:,} bytes of columns; at most {limit:,} are read.",
            hint="split the file, or write it with smaller row groups.",
        )
