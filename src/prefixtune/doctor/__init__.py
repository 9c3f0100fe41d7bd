"""Does a model carry prefixes correctly? Four comparisons, made when a type of model is first loaded."""
