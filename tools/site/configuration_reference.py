"""The reference of the configurations, from the models that check them."""

from __future__ import annotations

from collections.abc import Iterator

from prefixtune.distillation.config import DistillConfig
from prefixtune.engine.config import EngineConfig
from prefixtune.inference.config import ClassifyConfig, GenerateConfig
from prefixtune.jobs.config import WorkerConfig
from prefixtune.server.settings import ServeConfig
from prefixtune.training.config import TrainConfig
from prefixtune.utils.config import Config
from tools.site.http_reference import schema_table

INTRODUCTION = """\
Made from the classes that check these values, wherever they come from: options of the command line
([reference](cli.md)), files of `--config` ([how](training.md#configuration-files)), or keywords in Python. A field
has the option's name with underscores (of `generate` and `classify`, `max_total_length` is `--max-length`,
`response_schema` is `--schema`). Unknown fields and wrong values are refused, all at once."""
CONFIGURATIONS: dict[str, tuple[type[Config], str]] = {
    "train": (TrainConfig, "The file of `prefixtune train --config`; in Python `prefixtune.TrainConfig`."),
    "distill": (DistillConfig, "The file of `prefixtune distill --config`, and `distill.toml` of its run's folder."),
    "generate": (GenerateConfig, "How texts are generated; in Python `prefixtune.GenerateConfig`."),
    "classify": (ClassifyConfig, "How texts are classified and tagged."),
    "serve": (
        ServeConfig,
        "The file of `prefixtune serve --config`, and the variables `PREFIXTUNE_SERVE_NAME`; in Python "
        "`prefixtune.ServeConfig`.",
    ),
    "worker": (WorkerConfig, "The file of `prefixtune worker --config`, and the variables `PREFIXTUNE_WORKER_NAME`."),
    "engine": (EngineConfig, "Of the engine beneath the server; in Python `prefixtune.EngineConfig`."),
}


def page() -> str:
    """The reference of the configurations, in Markdown."""
    parts = ["# Configuration", INTRODUCTION]
    for name, (kind, where) in CONFIGURATIONS.items():
        parts += [f"## {name}", where, *_tables(kind)]
    return "\n\n".join(parts) + "\n"


def _tables(kind: type[Config]) -> Iterator[str]:
    """A table of a configuration's fields, and one for every model within it."""
    schema = kind.model_json_schema()
    yield schema_table(schema, without=kind.unused)
    for name, within in schema.get("$defs", {}).items():
        yield f"### {name}"
        yield within["description"].partition("\n\n")[0]
        yield schema_table(within)
