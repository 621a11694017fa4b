"""A peer whose DHT has lost everybody finds them again, by the addresses it knew."""

import asyncio

import pytest

from p2pllm.config.peer import NetworkConfig
from p2pllm.errors import NoPeersReached
from p2pllm.swarm.hivemind_network import HivemindNetwork
from p2pllm.swarm.identity import Identity
from p2pllm.swarm.network import Timeouts
from tests.swarm.processes import free_port

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(120)]


async def test_a_restarted_bootstrap_peer_is_found_again(tmp_path):
    door = NetworkConfig(host_maddrs=(f"/ip4/127.0.0.1/tcp/{free_port()}",))

    async def opened():
        identity = Identity.open(tmp_path / "door.key")
        return await HivemindNetwork.start(identity, door, Timeouts())

    first = await opened()
    guest = NetworkConfig(
        host_maddrs=("/ip4/127.0.0.1/tcp/0",), initial_peers=tuple(await first.addresses())
    )
    peer = await HivemindNetwork.start(Identity.ephemeral(), guest, Timeouts())
    try:
        await first.close()
        while await peer.is_connected():
            await peer.put("nobody/there", peer.me, b"", peer.now() + 5)
            await asyncio.sleep(0.1)
        assert not await peer.reconnect()
        second = await opened()
        try:
            while not await peer.reconnect():
                await asyncio.sleep(0.5)
        finally:
            await second.close()
    finally:
        await peer.close()


async def test_a_daemon_without_addresses_is_alive_until_it_is_killed(tmp_path):
    """A client has none: it was taken for dead, and its daemon replaced every few seconds."""
    door = await HivemindNetwork.start(
        Identity.ephemeral(), NetworkConfig(host_maddrs=("/ip4/127.0.0.1/tcp/0",)), Timeouts()
    )
    way_in = tuple(await door.addresses())
    config = NetworkConfig(client_only=True, relay=False, initial_peers=way_in)
    client = await HivemindNetwork.start(Identity.ephemeral(), config, Timeouts())
    try:
        assert await client.addresses() == []
        assert await client.is_alive()
        client._daemon._child.kill()
        await client._daemon._child.wait()
        assert not await client.is_alive()
    finally:
        for network in (client, door):
            await network.close()


async def test_a_peer_whose_initial_peers_are_gone_comes_back_through_those_it_has_seen(tmp_path):
    loopback = ("/ip4/127.0.0.1/tcp/0",)

    async def opened(name: str, *initial: str) -> HivemindNetwork:
        config = NetworkConfig(host_maddrs=loopback, initial_peers=initial)
        return await HivemindNetwork.start(
            Identity.open(tmp_path / f"{name}.key"), config, Timeouts()
        )

    door = await opened("door")
    [way_in, *_] = await door.addresses()
    ann, bob = await opened("ann", way_in), await opened("bob", way_in)
    try:
        bob.note(await ann.addresses())
        await bob.close()
        await door.close()
        bob = await opened("bob", way_in)
        assert await bob.is_connected()
        with pytest.raises(NoPeersReached, match=way_in.split("/")[-1]):
            await opened("cat", way_in)  # it has seen nobody
    finally:
        for network in (ann, bob):
            await network.close()
