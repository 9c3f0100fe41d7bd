"""Empty machines: fresh environments with the wheel and its core dependencies alone, made by pip and by uv.

Everything runs outside the checkout, with an empty HOME and an empty PREFIXTUNE_HOME, and without the settings that a
developer's environment has. Nothing of the project is imported here: `make clean-install` runs this folder by itself.
"""

import fcntl
import os
import shutil
import sys
import venv
from pathlib import Path
from urllib.parse import unquote

import pytest

from empty_machine import BIN, ROOT, Machine, call, new_folder, path_without_uv


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The package, built from the checkout; once for all processes of this run."""
    folder = tmp_path_factory.getbasetemp().parent / f"wheel-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not list(folder.glob("*.whl")):
            home = new_folder(tmp_path_factory, "wheel")
            call(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT, folder=home)
    (built,) = folder.glob("prefixtune-*.whl")
    return built


@pytest.fixture(scope="session")
def uv(tmp_path_factory):
    """uv: this machine's own, or one from the package index in an environment of its own."""
    if present := shutil.which("uv"):
        return Path(present)
    folder = new_folder(tmp_path_factory, "uv-program")
    venv.create(folder / "environment", with_pip=True)
    programs = folder / "environment" / BIN
    call(programs / "python", "-m", "pip", "install", "--quiet", "uv", folder=folder)
    found = shutil.which("uv", path=str(programs))
    assert found
    return Path(found)


@pytest.fixture(scope="session")
def torch_options(tmp_path_factory):
    """Options that make uv install the torch which pip would.

    uv reads none of pip's settings, and on Linux the index alone gives a torch with 3 GB of CUDA. pip downloads the one
    that this machine's settings choose; uv takes that file, and everything else from the index.
    """
    folder = new_folder(tmp_path_factory, "torch")
    files = folder / "files"
    call(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", files, "torch>=2.6", folder=folder)
    (torch,) = files.glob("torch-*.whl")
    constraints = folder / "constraints.txt"
    constraints.write_text(f"torch=={unquote(torch.name).split('-')[1]}\n", encoding="utf-8")
    return ["--find-links", str(files), "--constraints", str(constraints)]


def made_by_pip(factory, wheel):
    folder = new_folder(factory, "pip")
    venv.create(folder / "environment", with_pip=True)
    programs = folder / "environment" / BIN
    call(programs / "python", "-m", "pip", "install", "--quiet", wheel, folder=folder)
    return Machine("pip", folder, programs, path_without_uv())


def made_by_uv(factory, wheel, uv, torch_options):
    """As `uv venv` and `uv pip install` make one; then without the pip that the package brings."""
    folder = new_folder(factory, "uv")
    environment = folder / "environment"
    call(uv, "venv", "--quiet", "--python", sys.executable, environment, folder=folder)
    programs = environment / BIN
    call(uv, "pip", "install", "--quiet", "--python", environment, *torch_options, wheel, folder=folder)
    call(programs / "python", "-m", "pip", "--version", folder=folder)
    call(uv, "pip", "uninstall", "--quiet", "--python", environment, "pip", folder=folder)
    return Machine("uv", folder, programs, [*path_without_uv(), str(uv.parent)], uv)


@pytest.fixture(scope="session")
def machine(request, tmp_path_factory, wheel):
    """An empty machine with the package, made by pip or by uv."""
    if request.param == "pip":
        made = made_by_pip(tmp_path_factory, wheel)
    else:
        options = request.getfixturevalue("torch_options")
        made = made_by_uv(tmp_path_factory, wheel, request.getfixturevalue("uv"), options)
    yield made
    shutil.rmtree(made.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def first(machine):
    """What the first command prints, which fetches the backbone: by uv `demo`, by pip `prepare`."""
    return machine.run("prefixtune", "demo" if machine.name == "uv" else "prepare")


@pytest.fixture(scope="session")
def prefix(machine, first):
    """A prefix that `prefixtune train` makes from a small file."""
    source = ("--source", "{name} is {food}", "--target", "text")
    machine.prefixtune("train", "--train", "places.jsonl", *source, "--output", "runs/places", "--max-steps", "2")
    return Path("runs", "places", "prefix.safetensors")
