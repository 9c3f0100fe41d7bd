"""What each command of the command line does: call the library, and show the outcome.

One module a command, or a few of a kind. Nothing heavy is imported before a command runs.
"""
