"""Speed and memory of training."""
