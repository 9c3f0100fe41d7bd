"""Prefix and examples -> scores; `metrics` scores strings and imports nothing of this project."""
