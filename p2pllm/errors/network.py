"""Letters about identities, addresses and the network."""

from p2pllm.errors.letter import P2PLLMError


class IdentityUnreadable(P2PLLMError):
    """The identity file {path} cannot be used: {reason}.

    Name another one with --identity FILE; a file that does not exist is created.
    """


class IdentityInUse(P2PLLMError):
    """The identity {path} is in use by another p2pllm process on this machine.

    Its peer id is {peer_id}. Two peers cannot share one. Stop the other process, or give this
    peer a name of its own: add --name NAME
    """


class AddressInvalid(P2PLLMError):
    """{address} is not a usable multiaddr: {reason}

    A full one looks like /ip4/203.0.113.7/tcp/31337/p2p/12D3KooW... The bootstrap peer prints its
    own when it starts.
    """


class AddressInUse(P2PLLMError):
    """Another program already listens on {addresses}.

    Stop it, or listen elsewhere: --host-maddrs /ip4/0.0.0.0/tcp/PORT (port 0 takes a free one).
    """


class NoPeersReached(P2PLLMError):
    """None of the initial peers answered:
    {peers}

    Is one of them running and its port open? On its machine, see what it prints. Then try again, or
    name another peer of the swarm with --initial-peers.
    """


class NetworkDown(P2PLLMError):
    """The network part of this peer does not work: {reason}

    Start the command again. If it stays so, run it with --verbose and look at the last lines.
    """
