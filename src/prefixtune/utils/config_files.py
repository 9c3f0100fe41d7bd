"""Read a configuration file: TOML, or YAML with TOML's strictness."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, ClassVar

from prefixtune.errors import ConfigError
from prefixtune.utils.faults import show_value

__all__ = ["read_config_file"]

_MAX_BYTES = 1 << 20
_MAX_DIGITS = 1000
_NUMBER = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def read_config_file(path: Path) -> dict[str, Any]:
    """The keys and values of a TOML file, or of a YAML file (.yaml, .yml).

    Raises:
        ConfigError: The file is missing, larger than 1 MiB, or neither TOML nor YAML.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
        if len(raw) > _MAX_BYTES:
            raise ConfigError(f"the configuration {str(path)!r} is larger than 1 MiB.", hint="check the path.")
        text = raw.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        hint = "check its permissions." if isinstance(error, PermissionError) else "check the path."
        raise ConfigError(f"cannot read the configuration {str(path)!r}: {reason}.", hint=hint) from error
    if path.suffix.lower() in (".yaml", ".yml"):
        return _parse_yaml(text, path)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        # tomllib's own errors have a class of their own.
        reason = "a number has too many digits" if type(error) is ValueError else error
        raise ConfigError(
            f"{str(path)!r} is not TOML: {reason}.",
            hint='write lines such as dtype = "auto"; or name a YAML file .yaml.',
        ) from error


def _parse_yaml(text: str, path: Path) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """YAML 1.2's plain values: 1e-3 is a number, no and on are texts; no aliases, tags or repeated keys."""

        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if isinstance(event, yaml.AliasEvent):
                raise yaml.MarkedYAMLError(None, None, "aliases (*name) are not supported", event.start_mark)
            if event.tag not in (None, "!"):
                raise yaml.MarkedYAMLError(None, None, "tags (!name) are not supported", event.start_mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[str] = set()
            for key, _ in node.value:
                name = str(key.value)
                if name in seen:
                    raise yaml.MarkedYAMLError(None, None, f"the key {show_value(name)} is there twice", key.start_mark)
                seen.add(name)
            return super().construct_mapping(node, deep)

    def construct_int(_: Loader, node: Any) -> int:
        if len(node.value) > _MAX_DIGITS:
            raise yaml.MarkedYAMLError(None, None, "a number has too many digits", node.start_mark)
        return int(node.value)

    for tag, pattern, first in (
        ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), "tTfF"),
        ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
        ("int", re.compile(r"[-+]?\d+"), "-+0123456789"),
        ("float", _NUMBER, "-+0123456789."),
    ):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern.pattern})$"), list(first))
    # YAML 1.1 would read 010 as 8.
    Loader.add_constructor("tag:yaml.org,2002:int", construct_int)
    try:
        values = yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error)
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
            mark = error.problem_mark
            reason = f"{error.problem} (at line {mark.line + 1}, column {mark.column + 1})"
        raise ConfigError(
            f"{str(path)!r} is not YAML: {' '.join(reason.split())}.", hint="write lines such as dtype: auto"
        ) from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{str(path)!r} must hold keys and values.", hint="write lines such as dtype: auto")
    return values
