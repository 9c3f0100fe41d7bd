"""Files, locks, the machine, the console and optional libraries; knows nothing of prefixes, models or commands."""
