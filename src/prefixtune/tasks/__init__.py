"""Files -> examples: the tasks that this project reads.

A task knows its file formats and its linearization (structured fields -> one source string). It knows nothing of
tokenizers, tensors or training.
"""

from prefixtune.tasks.classification import check_labels, label_names
from prefixtune.tasks.examples import Example, ExampleLike, limit_targets, references_of
from prefixtune.tasks.records import as_examples
from prefixtune.tasks.registry import TASKS, Task, read_entries, read_task
from prefixtune.tasks.tagging import check_tags, tag_names

__all__ = [
    "TASKS",
    "Example",
    "ExampleLike",
    "Task",
    "as_examples",
    "check_labels",
    "check_tags",
    "label_names",
    "limit_targets",
    "read_entries",
    "read_task",
    "references_of",
    "tag_names",
]
