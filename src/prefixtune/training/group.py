"""Old names, until their users have moved."""

from prefixtune.training.together import *  # noqa: F403
