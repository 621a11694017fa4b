"""Rows, and which peer trains on which."""
