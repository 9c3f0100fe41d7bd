"""Does this backbone carry prefixes correctly? Every way of using one, checked against an independent computation.

    examine           runs all checks
    prepare           random prefixes, strong enough to show
    subject           what every check gets
    attention_checks, batch_checks, decoding_checks
    reference         the plainest way to run a prefix: one row, in full
    cached            a run with a cache

It reads no files and prints nothing.
"""
