"""Prefix and data -> scores."""
