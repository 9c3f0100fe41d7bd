"""`prefixtune env`: what a bug report needs."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import prefixtune
from prefixtune import __version__
from prefixtune.cli.common import print_json
from prefixtune.cli.options import CommandOptions, command, json_option
from prefixtune.utils.machine import describe_machine

__all__ = ["env"]

_CORE = ("torch", "transformers", "safetensors", "huggingface_hub", "pydantic", "cyclopts")
_SETTINGS = (
    "PREFIXTUNE_HOME",
    "PREFIXTUNE_DATA_CACHE",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
)
"""Environment variables that hold no secret."""


class EnvOptions(CommandOptions):
    """The options of `prefixtune env`."""

    as_json: bool = json_option("all of it")


@command
def env(options: EnvOptions) -> int:
    """Show versions, devices, precision and folders: what a bug report needs.

    It holds no key and no token.
    """
    facts: dict[str, Any] = {
        "versions": {
            "prefixtune": __version__,
            **_known(_commit),
            "python": platform.python_version(),
            **_versions(_CORE),
        },
        "extras": {extra: _versions(names) for extra, names in _extras().items()},
        "machine": {"platform": platform.platform(), **_known(describe_machine)},
        "torch": _known(_torch),
        "folders": _known(_folders),
        "hub": _known(_hub),
        "variables": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
    }
    if options.as_json:
        print_json(facts)
    else:
        for line in _lines(facts):
            print(line)
    return 0


def _known(read: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Some facts, or why they are not known: whatever is broken, the others are shown."""
    try:
        return dict(read())
    except Exception as error:
        return {"unknown": f"{type(error).__name__}: {error}".splitlines()[0]}


def _commit() -> dict[str, str]:
    """The commit of a checkout, with `+` where files were changed since; empty: the package is not in one."""
    root = Path(prefixtune.__file__).resolve().parents[2]
    if not (root / ".git").exists() or not shutil.which("git"):
        return {}
    arguments = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    done = subprocess.run(arguments, capture_output=True, text=True, errors="replace", timeout=10, check=False)
    return {"commit": done.stdout.strip()} if done.returncode == 0 else {}


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    """Library -> its version; empty: it is not installed."""
    versions: dict[str, str] = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = ""
    return versions


def _extras() -> dict[str, tuple[str, ...]]:
    """Extra -> its libraries."""
    extras: dict[str, tuple[str, ...]] = {}
    try:
        lines = requires("prefixtune") or []
    except PackageNotFoundError:
        lines = []
    for line in lines:
        library, extra = re.match(r"[\w.-]+", line), re.search(r"extra == ['\"]([\w-]+)", line)
        if library and extra and library[0] != "prefixtune":
            extras[extra[1]] = (*extras.get(extra[1], ()), library[0])
    return extras


def _torch() -> dict[str, Any]:
    import torch

    from prefixtune.backbone.devices import choose_device, choose_dtype

    device = choose_device("auto")
    devices = {"cpu": f"{torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple"
    return {
        "devices": devices,
        "default_device": str(device),
        "default_dtype": str(choose_dtype("auto", device)).removeprefix("torch."),
        "cuda": torch.version.cuda or "",
    }


def _folders() -> dict[str, str]:
    from huggingface_hub.constants import HF_HUB_CACHE

    from prefixtune.utils.folders import cache_folder

    return {"program": sys.executable, "cache": str(cache_folder()), "hub_cache": HF_HUB_CACHE}


def _hub() -> dict[str, bool]:
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    # Another endpoint is not shown: its address may hold a password.
    return {"offline": bool(HF_HUB_OFFLINE), "own_endpoint": ENDPOINT != "https://huggingface.co"}


def _lines(facts: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    for name, value in facts.items():
        if isinstance(value, Mapping) and value:
            yield f"{indent}{name}"
            yield from _lines(value, f"{indent}  ")
        else:
            shown = ("no", "yes")[value] if isinstance(value, bool) else value or "none"
            yield f"{indent}{name}: {shown}"
