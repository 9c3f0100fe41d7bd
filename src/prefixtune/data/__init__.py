"""Files -> examples -> token ids -> batches.

A task (`tasks/`, `registry`) knows its file formats and its linearization (structured fields -> one source string), and
nothing about models. Importing this package needs no backbone; `encoding`, `labels` and `batching` do.
"""

from __future__ import annotations

from prefixtune.data.examples import Example, ExampleLike, limit_targets, references_of
from prefixtune.data.forms import as_examples
from prefixtune.data.registry import TASKS, Task, read_data, read_task

__all__ = [
    "TASKS",
    "Example",
    "ExampleLike",
    "Task",
    "as_examples",
    "limit_targets",
    "read_data",
    "read_task",
    "references_of",
]
