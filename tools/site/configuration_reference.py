"""The reference of the configurations, from the models that check them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from prefixtune.distillation.config import DistillConfig
from prefixtune.engine.config import EngineConfig
from prefixtune.inference.config import ClassifyConfig, GenerateConfig
from prefixtune.jobs.config import WorkerConfig
from prefixtune.server.settings import ServeConfig
from prefixtune.training.config import TrainConfig
from prefixtune.utils.config import Config, allowed_range

INTRODUCTION = """\
Made from the classes that check these values, wherever they come from: options of the command line
([reference](cli.md)), files of `--config` ([how](training.md#configuration-files)), or keywords in Python. A key is the
option's name with underscores (of `generate` and `classify`, `max_total_length` is `--max-length`, `response_schema` is
`--schema`). Unknown keys and wrong values are refused, all at once."""
CONFIGURATIONS: dict[str, type[Config]] = {
    "train": TrainConfig,
    "distill": DistillConfig,
    "generate": GenerateConfig,
    "classify": ClassifyConfig,
    "serve": ServeConfig,
    "worker": WorkerConfig,
    "engine": EngineConfig,
}
WHERE = {
    "train": "The file of `prefixtune train --config`; in Python `prefixtune.TrainConfig`.",
    "distill": "The file of `prefixtune distill --config`, and `distill.toml` of its run's folder.",
    "generate": "How texts are generated; in Python `prefixtune.GenerateConfig`.",
    "classify": "How texts are classified and tagged.",
    "serve": "The file of `prefixtune serve --config`, and the variables `PREFIXTUNE_SERVE_NAME`; in Python "
    "`prefixtune.ServeConfig`.",
    "worker": "The file of `prefixtune worker --config`, and the variables `PREFIXTUNE_WORKER_NAME`.",
    "engine": "Of the engine beneath the server; in Python `prefixtune.EngineConfig`.",
}


def page() -> str:
    """The reference of the configurations, in Markdown."""
    parts = ["# Configuration", INTRODUCTION]
    for name, kind in CONFIGURATIONS.items():
        parts += [f"## {name}", WHERE[name], *_tables(kind)]
    return "\n\n".join(parts) + "\n"


def _tables(kind: type[Config]) -> Iterator[str]:
    """A table of a configuration's fields, and one for every model within it."""
    rows: list[str] = []
    within: list[type[Config]] = []
    for name, field in kind.model_fields.items():
        if name in kind.unused:
            continue
        words, models = _type(field.annotation, ())
        within += models
        value = " ".join(part for part in (words, allowed_range(field)) if part)
        cells = (f"`{name}`", value, _default(field), " ".join((field.description or "").split()))
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    yield "\n".join(["| key | value | default | |", "|---|---|---|---|", *rows])
    for model in dict.fromkeys(within):
        doc = re.split(r"\n\s*\n", model.__doc__ or "")[0]
        yield f"`{model.__name__}`: {' '.join(doc.split())}"
        yield from _tables(model)


def _type(annotation: Any, models: tuple[type[Config], ...]) -> tuple[str, tuple[type[Config], ...]]:
    """A type in words, and the models within it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in arguments), models
    if origin in (Union, UnionType):
        kinds = [_type(argument, models) for argument in arguments if argument is not NoneType]
        return " or ".join(dict.fromkeys(words for words, _ in kinds)), tuple(m for _, more in kinds for m in more)
    if origin is not None and hasattr(annotation, "__metadata__"):
        return _type(arguments[0], models)
    if origin is dict or (origin is not None and "Mapping" in str(origin)):
        words, more = _type(arguments[1], models)
        return f"table of {words}", more
    if origin is not None:
        kinds = [_type(argument, models) for argument in arguments if argument is not Ellipsis]
        return f"list of {' and '.join(dict.fromkeys(words for words, _ in kinds))}", tuple(
            m for _, ms in kinds for m in ms
        )
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return f"`{annotation.__name__}`", (*models, annotation)
    names = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation))), models


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if default is None or default is PydanticUndefined:
        return ""
    if isinstance(default, Config) or not isinstance(default, (str, int, float, bool, tuple, list, dict)):
        return ""
    return f"`{json.dumps(default, ensure_ascii=False)}`"
