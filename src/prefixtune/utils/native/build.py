"""Compile a source of this package for this processor, once, and keep the result in the user's cache folder.

A few seconds with any g++ or clang++, with or without OpenMP (see `threads.h`); in a process of its own, beside the
caller, who computes with torch meanwhile.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from prefixtune.errors import first_line
from prefixtune.utils.files import atomic_path
from prefixtune.utils.folders import cache_folder

__all__ = ["build", "pip_compiler", "private_folder", "start"]

_log = logging.getLogger(__name__)
_HEADERS = Path(__file__).parent
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp-simd", "-fno-exceptions", "-fno-rtti", f"-I{_HEADERS}")
_PROCESSOR_FLAGS = ("-march=native", "-mcpu=native", "")
"""The first that the compiler takes."""
_SECONDS = 120.0
"""Longest time that a compiler may take."""
_KEPT = 4
"""Compiled files of a source that stay in the cache: of other versions, processors and compilers."""

T = TypeVar("T")


def start(source: Path, load: Callable[[Path], T], without: str) -> Future[T | None]:
    """Compile a source beside the caller, and load it; the result is None if it cannot be made here, which is logged.

    Args:
        source: A file of C++.
        load: Gets the compiled library.
        without: What runs without it.
    """
    future: Future[T | None] = Future()

    def make() -> None:
        made = None
        try:
            made = load(build(source))
        # Whatever it is: there is another way to compute.
        except Exception as error:
            _log.warning("%s with torch alone, which is slower: %s", without, first_line(error))
        finally:
            future.set_result(made)

    threading.Thread(target=make, name="prefixtune-compile", daemon=True).start()
    return future


def build(source: Path, folder: Path | None = None) -> Path:
    """The compiled library, from the cache or by the compiler.

    Args:
        source: A file of C++.
        folder: Where it is kept; None: in the user's cache folder.

    Raises:
        OSError: There is no compiler, or it fails; or the processor, the system or the folder are not fit for it.
        PrefixError: The file cannot be written.
        subprocess.SubprocessError: The compiler took too long.
    """
    if sys.platform != "linux":
        raise OSError(f"compiled code is for Linux, not {sys.platform}.")
    compiler, openmp = _find_compiler(), _find_openmp()
    texts = [path.read_text(encoding="utf-8") for path in (source, *_headers(source))]
    facts = (*texts, *compiler.identity, Path(openmp).name, _processor())
    name = f"{source.stem}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}.so"
    folder = _cache() if folder is None else private_folder(folder)
    path = folder / name
    if path.is_file():
        if path.stat().st_uid != os.getuid():
            raise OSError(f"{path} belongs to another user.")
        return path
    with tempfile.TemporaryDirectory() as work:
        library = _compile(source, compiler, openmp, Path(work))
        with atomic_path(path) as temporary:
            shutil.copyfile(library, temporary)
    _remove_old(folder, source.stem)
    return path


def _headers(source: Path) -> list[Path]:
    """What a source may include: the headers here and those beside it."""
    return sorted({*_HEADERS.glob("*.h"), *source.parent.glob("*.h")})


@functools.cache
def _cache() -> Path:
    """Where compiled files are kept: where the user's cache cannot be written, for this process alone."""
    try:
        return private_folder(cache_folder() / "native")
    except OSError as error:
        # As of a container whose user owns nothing.
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT):
            raise
    folder = Path(tempfile.mkdtemp(prefix="prefixtune-native-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def private_folder(folder: Path) -> Path:
    """Make a folder that this user alone can write, or check that it is one: what lies in it is run.

    Raises:
        OSError: It cannot be made, belongs to another user, or others can write it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise OSError(f"{folder} is not a folder that only its user can write: remove it.")
    return folder


@dataclass(frozen=True)
class _Compiler:
    """A compiler's command, to compile with and to link with, and what changes when it is another one."""

    compile: tuple[str, ...]
    link: tuple[str, ...]
    identity: tuple[str, ...]


def _find_compiler() -> _Compiler:
    named = os.environ.get("CXX")
    candidates = [shlex.split(named)] if named else [["g++"], ["c++"], ["clang++"]]
    for name, *rest in filter(None, candidates):
        if program := shutil.which(name):
            command = (program, *rest)
            facts = Path(program).resolve().stat()
            return _Compiler(command, command, (*command, str(facts.st_size), str(facts.st_mtime_ns)))
    if not named and (zig := pip_compiler()):
        # It would first compile C++'s library, of which nothing is used; C's is there when the result is loaded.
        link = (*zig, "cc", "-nostdlib")
        return _Compiler((*zig, "c++"), link, ("ziglang", importlib.metadata.version("ziglang")))
    raise OSError("there is no C++ compiler (install g++ or clang++, or with pip: prefixtune[compiler]).")


def pip_compiler() -> tuple[str, ...]:
    """The command of what the extra `compiler` brings, without `c++` or `cc`; empty: it is not installed."""
    return (sys.executable, "-m", "ziglang") if importlib.util.find_spec("ziglang") is not None else ()


class _SymbolFacts(ctypes.Structure):
    """`Dl_info` of <dlfcn.h>."""

    _fields_ = [
        *(("file", ctypes.c_char_p), ("base", ctypes.c_void_p)),
        *(("name", ctypes.c_char_p), ("address", ctypes.c_void_p)),
    ]


def _find_openmp() -> str:
    """The OpenMP library that torch computes with: a second one would have threads of its own.

    Other packages (sentencepiece, scikit-learn) bring copies of it, which are loaded beside torch's.
    """
    import torch

    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        for name in ("GOMP_parallel", "__kmpc_fork_call"):
            # Of what torch is linked to, whatever else is loaded.
            function = getattr(library, name, None)
            facts = _SymbolFacts()
            if function is not None and ctypes.CDLL(None).dladdr(function, ctypes.byref(facts)) and facts.file:
                return os.fsdecode(facts.file)
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        found = re.search(r"/\S*/lib(?:g|i|)omp[^/]*\.so[^/\s]*$", line)
        if found:
            return found[0]
    raise OSError("torch has loaded no OpenMP library.")


def _processor() -> str:
    """What `native` means here."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    kinds = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part")
    told = sorted({line for line in lines if line.partition(":")[0].strip() in kinds})
    return "\n".join((platform.machine(), *told))


def _compile(source: Path, compiler: _Compiler, openmp: str, work: Path) -> Path:
    """Compile and link in a folder."""
    compiled, library = work / "made.o", work / "made.so"
    for flag in _PROCESSOR_FLAGS:
        flags = [*_FLAGS, *([flag] if flag else [])]
        error = _run([*compiler.compile, *flags, "-c", str(source), "-o", str(compiled)], work)
        if not error:
            break
    if not error:
        error = _run([*compiler.link, "-shared", str(compiled), openmp, "-o", str(library)], work)
    if error:
        raise OSError(f"{' '.join(compiler.compile)} failed: {error}")
    return library


def _run(command: Sequence[str], work: Path) -> str:
    """Run a compiler at low priority, with a folder for files of its own; returns its error, or nothing."""
    nice = shutil.which("nice")
    process = subprocess.Popen(
        [*([nice, "-n", "10"] if nice else []), *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
        env={**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(work), "ZIG_LOCAL_CACHE_DIR": str(work)},
    )

    def kill() -> None:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)

    atexit.register(kill)
    try:
        _, errors = process.communicate(timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        kill()
        process.wait()
        raise
    finally:
        atexit.unregister(kill)
    if process.returncode == 0:
        return ""
    lines = [line for line in errors.splitlines() if "error" in line] or errors.splitlines()
    return lines[0].strip() if lines else f"exit status {process.returncode}"


def _remove_old(folder: Path, stem: str) -> None:
    """Keep the newest files only; one that a process has loaded stays loaded."""
    times: dict[Path, float] = {}
    for path in folder.glob(f"{stem}-*.so"):
        # Another process may remove the same ones.
        with contextlib.suppress(OSError):
            times[path] = path.stat().st_mtime
    for path in sorted(times, key=lambda path: times[path], reverse=True)[_KEPT:]:
        with contextlib.suppress(OSError):
            path.unlink()
