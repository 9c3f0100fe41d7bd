"""The commands, one module each: options, and a function by their name that calls the library and shows the outcome.

Nothing heavy is imported before a command runs.
"""
