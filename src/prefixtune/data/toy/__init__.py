"""Small data sets that are made here, to try things on; equal arguments give equal sets on every version of Python."""
