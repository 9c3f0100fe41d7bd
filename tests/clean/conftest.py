"""Empty machines: fresh environments with the wheel and its core dependencies alone, made by pip and by uv.

Everything runs outside the checkout, with an empty HOME and an empty PREFIXTUNE_HOME, and without the settings that a
developer's environment has. Nothing of the project is imported here: `make clean-install` runs this folder by itself.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = "Scripts" if os.name == "nt" else "bin"
NOBODY = "http://127.0.0.1:9"
"""A proxy that answers nobody: what should need no network meets it."""

PLACES = [
    {"name": name, "food": food, "text": f"{name} serves {food} food."}
    for name, food in [("Aromi", "Italian"), ("Bibi", "Thai"), ("Cotto", "French"), ("Fitz", "Greek")]
]


@dataclass
class Machine:
    """An environment with the package, and where its user works.

    Attributes:
        name: What made it: `pip` or `uv`.
        folder: Empty at first; HOME, the cache and the user's files lie in it.
        programs: The folder of the environment's programs.
        path: Folders on the path beside it.
        uv: The program, for what is to be tested with it; never on the path of an environment that pip made.
    """

    name: str
    folder: Path
    programs: Path
    path: list[str] = field(default_factory=list)
    uv: Path | None = None

    @property
    def work(self) -> Path:
        """The folder that commands run in."""
        return self.folder / "work"

    @property
    def offline(self) -> dict[str, str]:
        """Settings with which every network access fails at once."""
        return {"HTTPS_PROXY": NOBODY, "HTTP_PROXY": NOBODY, "ALL_PROXY": NOBODY, "NO_PROXY": "", "no_proxy": ""}

    def run(self, *command: str | Path, code: int = 0, stdin: str = "", **settings: str) -> tuple[str, str]:
        """Run a program of the environment; its stdout and stderr."""
        words = [str(word) for word in command]
        words[0] = shutil.which(words[0], path=str(self.programs)) or words[0]
        environment = clean_environment(self.folder, [str(self.programs), *self.path]) | settings
        done = subprocess.run(
            words, cwd=self.work, env=environment, input=stdin, capture_output=True, text=True, timeout=900
        )
        shown = f"{' '.join(words)}\nexit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert done.returncode == code, shown
        assert "Traceback" not in done.stderr, shown
        return done.stdout, done.stderr

    def prefixtune(self, *words: str | Path, code: int = 0, stdin: str = "") -> tuple[str, str]:
        """A command that needs no network, and gets none."""
        return self.run("prefixtune", *words, code=code, stdin=stdin, **self.offline)

    def mistake(self, *words: str | Path) -> str:
        """A command that ends with one line of error and its hint; what they say."""
        _, err = self.prefixtune(*words, code=2)
        lines = [line for line in err.splitlines() if not line.startswith("loading ")]
        assert [line.partition(" ")[0] for line in lines] == ["error:", "hint:"], err
        return "\n".join(lines)


def clean_environment(folder: Path, path: list[str]) -> dict[str, str]:
    """This process's environment without anything that names a checkout, a home or a cache; pip's settings stay."""
    dropped = ("PYTHON", "PREFIXTUNE", "HF_", "TRANSFORMERS_", "XDG_", "VIRTUAL_ENV", "PYTEST_", "MAKE", "MFLAGS")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped) and name != "UV"}
    return kept | {
        "HOME": str(folder / "home"),
        "USERPROFILE": str(folder / "home"),
        "PREFIXTUNE_HOME": str(folder / "prefixtune"),
        "PATH": os.pathsep.join(path),
        "NO_COLOR": "1",
        "COLUMNS": "200",
    }


def path_without_uv() -> list[str]:
    """This machine's path, without folders that hold uv or a prefixtune."""
    folders = os.environ["PATH"].split(os.pathsep)
    return [one for one in folders if not any(shutil.which(name, path=one) for name in ("uv", "prefixtune"))]


def call(*command: str | Path, folder: Path, **settings: str) -> str:
    """Run a program that makes the environments, and show what it said where it fails."""
    environment = clean_environment(folder, path_without_uv()) | settings
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, f"{' '.join(words)}\nexit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def new_folder(factory: pytest.TempPathFactory, name: str) -> Path:
    folder = factory.mktemp(name)
    for part in ("home", "prefixtune", "work"):
        (folder / part).mkdir()
    lines = "".join(json.dumps(place) + "\n" for place in PLACES)
    (folder / "work" / "places.jsonl").write_text(lines, encoding="utf-8")
    (folder / "work" / "said.txt").write_text("".join(place["text"] + "\n" for place in PLACES), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, built from the checkout."""
    folder = new_folder(tmp_path_factory, "wheel")
    call(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT, folder=folder)
    (built,) = folder.glob("prefixtune-*.whl")
    return built


@pytest.fixture(scope="session")
def uv(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
def torch_options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
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


def made_by_pip(factory: pytest.TempPathFactory, wheel: Path) -> Machine:
    folder = new_folder(factory, "pip")
    venv.create(folder / "environment", with_pip=True)
    programs = folder / "environment" / BIN
    call(programs / "python", "-m", "pip", "install", "--quiet", wheel, folder=folder)
    return Machine("pip", folder, programs, path_without_uv())


def made_by_uv(factory: pytest.TempPathFactory, wheel: Path, uv: Path, torch_options: list[str]) -> Machine:
    """As `uv venv` and `uv pip install` make one; then without the pip that the package brings."""
    folder = new_folder(factory, "uv")
    environment = folder / "environment"
    call(uv, "venv", "--quiet", "--python", sys.executable, environment, folder=folder)
    programs = environment / BIN
    call(uv, "pip", "install", "--quiet", "--python", environment, *torch_options, wheel, folder=folder)
    call(programs / "python", "-m", "pip", "--version", folder=folder)
    call(uv, "pip", "uninstall", "--quiet", "--python", environment, "pip", folder=folder)
    return Machine("uv", folder, programs, [*path_without_uv(), str(uv.parent)], uv)


@pytest.fixture(scope="session", params=["pip", "uv"])
def machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Iterator[Machine]:
    """An empty machine with the package, once made by pip and once by uv."""
    if request.param == "pip":
        made = made_by_pip(tmp_path_factory, wheel)
    else:
        options = request.getfixturevalue("torch_options")
        made = made_by_uv(tmp_path_factory, wheel, request.getfixturevalue("uv"), options)
    yield made
    shutil.rmtree(made.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def demo(machine: Machine) -> tuple[str, str]:
    """What a short `prefixtune demo` prints, the first command of all; it fetches the backbone."""
    return machine.run("prefixtune", "demo", "--steps", "2")


@pytest.fixture(scope="session")
def prefix(machine: Machine, demo: tuple[str, str]) -> Path:
    """A prefix that `prefixtune train` made from a small file."""
    source = ("--source", "{name} is {food}", "--target", "text")
    machine.prefixtune("train", "--train", "places.jsonl", *source, "--output", "runs/places", "--max-steps", "2")
    return Path("runs", "places", "prefix.safetensors")
