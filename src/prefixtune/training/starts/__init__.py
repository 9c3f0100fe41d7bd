"""Where a prefix starts: real words, a text, solved examples, another prefix, or random numbers."""
