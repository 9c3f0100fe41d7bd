"""Where a prefix starts: real words, a text, solved examples, another prefix, or random numbers."""

from prefixtune.training.starts.start import Start

__all__ = ["Start"]
