"""A helper of the tests that read data files."""

import gzip


def write(path, text, encoding="utf-8"):
    """Write a file with this text, gzipped if its name says so; its folder is created. Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path
