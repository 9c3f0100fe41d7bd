"""Small sets that are made here, to try things on."""
