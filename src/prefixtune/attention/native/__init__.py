"""Attention by compiled code."""
