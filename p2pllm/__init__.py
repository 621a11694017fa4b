"""p2pllm: fine-tune one language model together, peer to peer, with no central server."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from p2pllm.roles.gossip import GossipCallback

__all__ = ["GossipCallback", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The callback imports torch and transformers, so it comes only when it is asked for."""
    if name == "GossipCallback":
        from p2pllm.roles.gossip import GossipCallback

        return GossipCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
