"""The package as a whole: a quick import, and tests that are all run."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_importing_is_quick_and_configurations_need_no_extra():
    """Nothing heavy before it is used; a server's configuration needs neither torch nor the server's own packages."""
    script = (
        "import sys, prefixtune as pt; pt.TrainConfig(), pt.ServeConfig(); "
        "print([name for name in ('torch', 'transformers', 'starlette', 'uvicorn', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_readme_names_every_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    listed = re.search(r"\*\*Extras\*\*: (.*?)\n\n", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert set(re.findall(r"`([\w-]+)`", listed[1])) == set(extras)


def test_a_citation_is_of_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_every_test_is_run_by_make_test_or_by_a_target_of_its_own():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    plain = [ROOT / path for path in settings["testpaths"]]
    started = re.findall(r"(?:pytest|PYTEST\)) .*", (ROOT / "Makefile").read_text(encoding="utf-8"))
    others = [path for line in started for path in re.findall(r"tests/\S+", line)]
    for file in (ROOT / "tests").rglob("test_*.py"):
        paths = (*plain, *(ROOT / path for path in others))
        assert any(file.is_relative_to(path) for path in paths), f"nothing runs {file}"
    for path in plain:
        for file in [path] if path.is_file() else path.rglob("test_*.py"):
            # A package that is missing must not turn into a test that is skipped; `resource` is not on every system.
            if {"golden", "gpu"} & set(file.parts):
                continue
            skipped = re.findall(r"importorskip\(.(\w+)", file.read_text(encoding="utf-8"))
            assert set(skipped) <= {"resource"}, f"{file} belongs into tests/integrations"
