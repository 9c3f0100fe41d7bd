"""Generate, stream and classify; every text with its own prefix, mixed in one batch. Knows no tasks and no training."""
