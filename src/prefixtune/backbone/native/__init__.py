"""Compiled code, where this machine has a C++ compiler; everything goes without it too."""
