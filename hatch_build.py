"""Adds the shells' completion scripts to a wheel, where shells look for them beside an installed program."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# Shell -> the script's place in an environment.
SCRIPTS = {
    "bash": "share/bash-completion/completions/prefixtune",
    "zsh": "share/zsh/site-functions/_prefixtune",
    "fish": "share/fish/vendor_completions.d/prefixtune.fish",
}


class CompletionHook(BuildHookInterface):
    """Generates the scripts from the command line itself: they name every command and option of this version."""

    PLUGIN_NAME = "completion"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Write the scripts and add them to the wheel; an editable install has none, as its options change."""
        if version == "editable":
            return
        sys.path.insert(0, str(Path(self.root) / "src"))
        try:
            from prefixtune.cli.main import build_app

            app = build_app()
        finally:
            sys.path.pop(0)
        folder = Path(tempfile.mkdtemp(prefix="prefixtune-completion-"))
        for shell, place in SCRIPTS.items():
            script = folder / shell
            script.write_text(app.generate_completion(shell=shell), encoding="utf-8")
            build_data["shared_data"][str(script)] = place
        self._folder = folder

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the temporary files."""
        import shutil

        if version != "editable":
            shutil.rmtree(self._folder, ignore_errors=True)
