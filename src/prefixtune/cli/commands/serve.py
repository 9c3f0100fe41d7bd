"""`prefixtune serve`: one model and many prefixes over HTTP."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from prefixtune.cli.options import ConfigOptions, command
from prefixtune.server.settings import SERVER_LIBRARIES, ServeConfig
from prefixtune.utils.config import Layer
from prefixtune.utils.console import Console
from prefixtune.utils.extras import needs_extra

__all__ = ["ServeOptions", "serve"]


def _key_name(value: Any) -> Any:
    """The name in what follows `--new-key`, a list."""
    return ((value and value[-1]) or "me") if isinstance(value, list) else value


class ServeOptions(ConfigOptions, ServeConfig):
    """The options of `prefixtune serve`."""

    new_key: Annotated[str, BeforeValidator(_key_name)] = Field(
        "",
        description="make an API key, print it and its table for NAME (me), and exit",
        json_schema_extra={"many": [0, 1], "metavar": "[NAME]"},
    )
    quiet: bool = Field(False, description="only errors on stderr; the log on stdout has its level")

    @classmethod
    def layers(cls, given: Mapping[str, Any]) -> Iterable[Layer]:
        """The file that is named by `--config`, and the environment."""
        return [] if "new_key" in given else [*super().layers(given), *ServeConfig.sources(None, os.environ)]


@command
def serve(options: ServeOptions) -> int:
    """Serve one model and many prefixes over HTTP, with OpenAI's interface.

    The file of --config may also have tables [keys.NAME]. Variables such as PREFIXTUNE_SERVE_PORT win over the file,
    and options over both.

    For example:
        prefixtune serve --prefixes prefixes
        prefixtune serve --config serve.toml --host 0.0.0.0
        prefixtune serve --new-key alice
    """
    if "new_key" in options.model_fields_set:
        return _new_key(options.new_key)
    config, console = options.part(ServeConfig), Console(quiet=options.quiet)
    if config.engine == "llama.cpp":
        with needs_extra("llama", "--engine llama.cpp"):
            importlib.import_module("xllamacpp")
    with needs_extra("serve", "the server"):
        for library in SERVER_LIBRARIES:
            importlib.import_module(library)
        from prefixtune.server.launch import run as launch
    return launch(config, console)


def _new_key(name: str) -> int:
    from prefixtune.server.auth import hash_key, new_key

    key = new_key()
    print(f"key for its user; it is not stored anywhere:\n\n    {key}\n")
    print("table for the file of --config:\n")
    print(f'    [keys.{json.dumps(name)}]\n    hash = "{hash_key(key)}"')
    print(
        '    prefixes = ["*"]              # patterns of model names\n    requests_per_minute = 0       # 0: any number'
    )
    print("    concurrent = 0                # requests at once; 0: any number")
    print("    admin = false                 # true: sees, changes and deletes what all keys have")
    print(
        "    train = true                  # may upload files and train\n    max_jobs = 10                 # unfinished"
    )
    return 0
