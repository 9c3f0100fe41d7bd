"""constraints.txt pins, with hashes and without addresses, what the package needs."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "constraints.txt").read_text(encoding="utf-8")
PINS = re.findall(r"^\S.*(?:\n    --hash=\S.*)*", re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE), flags=re.MULTILINE)


def test_the_dependencies_are_pinned_within_their_bounds():
    pinned = {}
    for pin in PINS:
        requirement = Requirement(pin.split("\\\n")[0])
        pinned.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["serve"], *extras["scores"], *extras["lora"]]:
        wanted = Requirement(text)
        found = pinned[canonicalize_name(wanted.name)]
        for requirement in found:
            (version,) = (one.version for one in requirement.specifier)
            assert wanted.specifier.contains(version), f"{text}, but {requirement}"
