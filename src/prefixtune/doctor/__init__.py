"""Does this backbone carry prefixes correctly? Checks against independent computations."""
