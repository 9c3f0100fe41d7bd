"""Other projects' files, in and out: PEFT's prefix adapters, and the checkpoints of the method's authors.

Knows nothing of how a prefix is trained and used.
"""
