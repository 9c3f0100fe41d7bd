"""Old names, until their users have moved."""

from prefixtune.training.run import *  # noqa: F403
