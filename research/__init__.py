"""Comparisons of methods: outside the package."""
