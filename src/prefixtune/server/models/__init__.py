"""What can be served: a folder of prefixes, their names, and the fields of their tasks."""
