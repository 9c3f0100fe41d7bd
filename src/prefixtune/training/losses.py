"""Old names, until their users have moved."""

from prefixtune.training.score import score_targets as target_losses

__all__ = ["target_losses"]
