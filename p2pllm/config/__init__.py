"""What a run agrees on (run.py), what a peer decides for itself (peer.py), and reading both."""
