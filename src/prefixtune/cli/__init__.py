"""The command line: parse and call; one module a command in `commands`."""
