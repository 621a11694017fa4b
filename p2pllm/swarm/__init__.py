"""Peers, rounds and the all-reduce: no tensors library, no models."""

import os

os.environ.setdefault("HIVEMIND_LOGLEVEL", "CRITICAL")  # its errors reach users as our letters
