"""Generate, stream and classify with prefixes; every text with its own, mixed in one batch."""
