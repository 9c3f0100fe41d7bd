"""`prefixtune env`: what a bug report needs."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from prefixtune import __version__
from prefixtune.cli.common import print_json
from prefixtune.cli.options import CommandOptions, command, json_option
from prefixtune.utils.machine import describe_machine

__all__ = ["env"]

_SETTINGS = (
    "PREFIXTUNE_HOME",
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
        "versions": {"prefixtune": __version__, "python": platform.python_version(), **_libraries()},
        "machine": {"platform": platform.platform(), **describe_machine()},
        "torch": _torch(),
        "folders": _folders(),
        "variables": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
    }
    if options.as_json:
        print_json(facts)
    else:
        for line in _lines(facts):
            print(line)
    return 0


def _libraries() -> dict[str, str]:
    """The installed libraries that this package or one of its extras needs, with their versions."""
    names = dict.fromkeys(one[0] for line in requires("prefixtune") or [] if (one := re.match(r"[\w.-]+", line)))
    found = {}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _torch() -> dict[str, Any]:
    import torch

    from prefixtune.backbone.devices import choose_device, choose_dtype

    try:
        device = choose_device("auto")
    except Exception as error:
        # Whatever is broken, the rest is shown.
        return {"unknown": f"{type(error).__name__}: {error}".splitlines()[0]}
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


def _lines(facts: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    for name, value in facts.items():
        if isinstance(value, Mapping) and value:
            yield f"{indent}{name}"
            yield from _lines(value, f"{indent}  ")
        else:
            shown = ("no", "yes")[value] if isinstance(value, bool) else value or "none"
            yield f"{indent}{name}: {shown}"
