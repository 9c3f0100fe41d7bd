"""prefixtune."""
