"""What p2pd says of a dial that failed: whether to try again at once, or to give up on the peer.
And the frames on its streams."""

import asyncio
import socket
from types import SimpleNamespace
from typing import cast

import pytest
from hivemind.p2p.p2p_daemon_bindings.utils import P2PHandlerError

from p2pllm.swarm.daemon import Daemon, DaemonStream
from p2pllm.swarm.hivemind_network import HivemindNetwork
from p2pllm.swarm.network import DialledTooSoon, NetworkError, receive

PEER = "12D3KooWQaBJYkP4YxmzBxPi4EEgjCdoHxe6uywQ6fkJMkiRmWGU"


@pytest.mark.parametrize(
    ("said", "is_crossed"),
    [
        ("failed to negotiate security protocol: noise: message is too short", True),
        ("failed to dial: dial backoff", True),
        ("failed to dial: connection refused", False),
        ("protocols not supported", False),
    ],
)
async def test_only_calls_that_crossed_are_tried_again(said, is_crossed):
    async def let_dial(peer):
        pass

    async def call(peer, protocol):
        raise P2PHandlerError(said)

    network = HivemindNetwork.__new__(HivemindNetwork)
    daemon = SimpleNamespace(let_dial=let_dial, call_binary_stream_handler=call)
    network._daemon = cast(Daemon, daemon)
    with pytest.raises(NetworkError, match=PEER) as problem:
        await network.open(PEER, "p2pllm/reduce")
    assert isinstance(problem.value, DialledTooSoon) == is_crossed


async def test_a_wait_that_ends_in_the_midst_of_a_frame_costs_nobody_the_frame():
    ours, theirs = socket.socketpair()
    stream = DaemonStream(PEER, *await asyncio.open_connection(sock=ours))
    frame, after = b"x" * 100_000, b"why it is over"
    theirs.sendall(len(frame).to_bytes(4, "big") + frame[:10])
    with pytest.raises(NetworkError, match="silent"):
        await receive(stream, len(frame), 0.05)
    theirs.sendall(frame[10:] + len(after).to_bytes(4, "big") + after)
    assert await receive(stream, len(frame), 5.0) == frame
    assert await receive(stream, len(after), 5.0) == after
    assert stream.bytes_received == 8 + len(frame) + len(after)
    stream.close()
    theirs.close()
