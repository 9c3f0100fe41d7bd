"""Put another function in the place of one of this project's, in every module that has imported it."""

import sys


def replace_everywhere(monkeypatch, original, replacement):
    """Let every loaded module of `prefixtune` that knows `original` by its name use `replacement` until the test ends.

    Raises:
        LookupError: No module knows it: the test would change nothing.
    """
    name = original.__name__
    users = [
        module
        for title, module in list(sys.modules.items())
        if title.startswith("prefixtune.") and vars(module).get(name) is original
    ]
    if not users:
        raise LookupError(f"no loaded module of prefixtune has {name}")
    for module in users:
        monkeypatch.setattr(module, name, replacement)
