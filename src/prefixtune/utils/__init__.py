"""Files, machine, console, optional extras: knows nothing of prefixes."""
