"""A machine without this project: an environment, a home and a folder to work in, and the commands run there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = "Scripts" if os.name == "nt" else "bin"
NOBODY = "http://127.0.0.1:9"
"""A proxy that answers nobody: what should need no network meets it."""

PLACES = [
    {"name": name, "food": food, "text": f"{name} serves {food} food."}
    for name, food in [("Aromi", "Italian"), ("Bibi", "Thai"), ("Cotto", "French"), ("Fitz", "Greek")]
]


RUN = """
import contextlib, io, json, sys
from prefixtune.cli.main import main
done = []
for words in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    done.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(done))
"""


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
    def work(self):
        """The folder that commands run in."""
        return self.folder / "work"

    @property
    def offline(self):
        """Settings with which every network access fails at once."""
        return {"HTTPS_PROXY": NOBODY, "HTTP_PROXY": NOBODY, "ALL_PROXY": NOBODY, "NO_PROXY": "", "no_proxy": ""}

    def run(self, *command, code=0, stdin="", **settings):
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

    def prefixtune(self, *words, code=0, stdin=""):
        """A command that needs no network, and gets none."""
        return self.run("prefixtune", *words, code=code, stdin=stdin, **self.offline)

    def commands(self, *commands):
        """Commands in one process, which loads torch once: the exit code, stdout and stderr of each."""
        words = json.dumps([list(map(str, command)) for command in commands])
        out, _ = self.run("python", "-c", RUN, stdin=words, **self.offline)
        return [(code, said, told) for code, said, told in json.loads(out)]

    def results(self, *commands):
        """What commands print, which all do their work, in one process."""
        done = self.commands(*commands)
        assert not [one for one in done if one[0] or "Traceback" in one[2]], done
        return [out for _, out, _ in done]

    def mistakes(self, *commands):
        """Commands that each end with one line of error and its hint; what they say."""
        found = []
        for code, _, err in self.commands(*commands):
            lines = [line for line in err.splitlines() if not line.startswith("loading ")]
            assert (code, [line.partition(" ")[0] for line in lines]) == (2, ["error:", "hint:"]), err
            found.append("\n".join(lines))
        return found


def clean_environment(folder, path):
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


def path_without_uv():
    """This machine's path, without folders that hold uv or a prefixtune."""
    folders = os.environ["PATH"].split(os.pathsep)
    return [one for one in folders if not any(shutil.which(name, path=one) for name in ("uv", "prefixtune"))]


def call(*command, folder, **settings):
    """Run a program that makes the environments, and show what it said where it fails."""
    environment = clean_environment(folder, path_without_uv()) | settings
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, f"{' '.join(words)}\nexit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def new_folder(factory, name):
    folder = factory.mktemp(name)
    for part in ("home", "prefixtune", "work"):
        (folder / part).mkdir()
    lines = "".join(json.dumps(place) + "\n" for place in PLACES)
    (folder / "work" / "places.jsonl").write_text(lines, encoding="utf-8")
    (folder / "work" / "said.txt").write_text("".join(place["text"] + "\n" for place in PLACES), encoding="utf-8")
    return folder
