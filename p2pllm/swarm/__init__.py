"""Peers, rounds and the all-reduce: no tensors library, no models."""
