"""`prefixtune config`: the JSON schema of a configuration, for editors."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from prefixtune.cli.options import CommandOptions, command, positional
from prefixtune.utils.config import Config

__all__ = ["CONFIGURATIONS", "config", "configuration"]

CONFIGURATIONS = {
    "train": ("training.config", "TrainConfig"),
    "distill": ("distillation.config", "DistillConfig"),
    "generate": ("inference.config", "GenerateConfig"),
    "classify": ("inference.config", "ClassifyConfig"),
    "serve": ("server.settings", "ServeConfig"),
    "worker": ("jobs.config", "WorkerConfig"),
    "engine": ("engine.config", "EngineConfig"),
}
"""Name -> the module and the class of a configuration."""


class ConfigCommandOptions(CommandOptions):
    """The options of `prefixtune config`."""

    action: Literal["", "schema"] = positional("", description="schema: print the JSON schema of a configuration")
    name: Literal["", "train", "distill", "generate", "classify", "serve", "worker", "engine"] = positional(
        "", description="whose files the schema is for"
    )
    output: str = Field("", description="write the schema to this file")

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """A schema has a name."""
        if self.action and not self.name:
            yield ("name",), f"NAME is missing, which must be one of {', '.join(CONFIGURATIONS)}"


@command
def config(options: ConfigCommandOptions) -> int:
    """Write the JSON schema of a configuration, so that editors complete its files.

    For example:
        prefixtune config schema serve --output serve.schema.json

    An editor then needs a first line in the TOML file, `#:schema serve.schema.json`, or in the YAML file,
    `# yaml-language-server: $schema=serve.schema.json`.
    """
    if not options.action:
        from prefixtune.cli.main import build_app

        build_app("config")(["config", "--help"], result_action="return_value")
        return 0
    schema = json.dumps(configuration(options.name).json_schema(), indent=2, ensure_ascii=False)
    if options.output:
        from prefixtune.utils.files import check_writable, write_text

        check_writable(Path(options.output))
        write_text(Path(options.output), f"{schema}\n")
        print(options.output)
    else:
        print(schema)
    return 0


def configuration(name: str) -> type[Config]:
    """The class of a configuration, by its name in `CONFIGURATIONS`."""
    module, kind = CONFIGURATIONS[name]
    configuration: type[Config] = getattr(importlib.import_module(f"prefixtune.{module}"), kind)
    return configuration
