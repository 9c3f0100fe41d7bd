"""The commands, one module each: `register` adds the options, `run` calls the library and shows the outcome.

Nothing heavy is imported before a command runs.
"""
