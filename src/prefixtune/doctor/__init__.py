"""Does a model carry prefixes correctly? Five comparisons, made when a type of model is first loaded."""
