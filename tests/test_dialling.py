"""What p2pd says of a dial that failed: whether to try again at once, or to give up on the peer."""

from types import SimpleNamespace
from typing import cast

import pytest
from hivemind.p2p.p2p_daemon_bindings.utils import P2PHandlerError

from p2pllm.swarm.daemon import Daemon
from p2pllm.swarm.hivemind_network import HivemindNetwork
from p2pllm.swarm.network import DialledTooSoon, NetworkError

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
