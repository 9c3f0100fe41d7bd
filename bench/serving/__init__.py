"""Speed and memory of generating and serving."""
