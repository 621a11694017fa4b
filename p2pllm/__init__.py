"""p2pllm: fine-tune one language model together, peer to peer, with no central server."""

__version__ = "0.1.0"
