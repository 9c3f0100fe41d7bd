"""C++ of this package, compiled on the user's machine for its processor."""
