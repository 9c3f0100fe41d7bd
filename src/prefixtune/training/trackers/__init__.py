"""Experiment trackers: a run's figures in trackio, Weights & Biases, TensorBoard or MLflow, kept in the run's folder."""
