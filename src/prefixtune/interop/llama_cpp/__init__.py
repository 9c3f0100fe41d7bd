"""A trained prefix for llama.cpp: a sequence-state file, and a check that it is in effect."""
