"""What can be served: the folder of prefixes, their names, and the fields of their tasks. Knows no HTTP routes."""
