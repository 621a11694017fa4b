"""Local steps, evaluation, checkpoints: one machine, no network."""
