"""Configuration, start, loop, checkpoints, baselines, processes."""
