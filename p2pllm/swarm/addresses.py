"""Whether a peer's own addresses can work, found out before the daemon starts: it would only say so
in its log, or not at all."""

import socket

from hivemind.utils.multiaddr import Multiaddr

from p2pllm.config.peer import NetworkConfig
from p2pllm.errors import AddressInUse, AddressInvalid


def check_addresses(config: NetworkConfig) -> None:
    """Raises AddressInvalid."""
    for address in (*config.initial_peers, *config.host_maddrs, *config.announce_maddrs):
        try:
            parts = Multiaddr(address)
            str(parts)
        except Exception as problem:  # the parser raises a different type for each kind of garbage
            raise AddressInvalid(address=address, reason=problem) from problem
        if address in config.initial_peers and "p2p" not in parts:
            raise AddressInvalid(address=address, reason="it lacks the /p2p/<peer id> at its end")


def check_ports(config: NetworkConfig) -> None:
    """Raises AddressInUse."""
    for address in config.host_maddrs:
        parts = Multiaddr(address)
        if "ip4" in parts and "tcp" in parts and parts["tcp"] != "0":
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((parts["ip4"], int(parts["tcp"])))
                except OSError as problem:
                    raise AddressInUse(addresses=address) from problem
