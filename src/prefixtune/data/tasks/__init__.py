"""One module a task: its file formats, and how a record becomes a source."""
