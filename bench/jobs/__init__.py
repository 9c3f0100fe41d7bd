"""Proofs and measures of training over HTTP."""
