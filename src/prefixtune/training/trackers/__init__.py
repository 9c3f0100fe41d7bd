"""Experiment trackers: a run in trackio, Weights & Biases, TensorBoard or MLflow, kept in the run's folder."""
