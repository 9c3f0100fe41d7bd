"""Old names, until their users have moved."""

from prefixtune.training.run_folder import *  # noqa: F403
