"""Records that nobody signed, brought into a real DHT by a node that checks nothing."""

from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from p2pllm.config.load import load_run
from p2pllm.config.peer import NetworkConfig
from p2pllm.swarm.hivemind_network import HivemindNetwork
from p2pllm.swarm.identity import Identity
from p2pllm.swarm.manifest import Manifest
from p2pllm.swarm.network import Timeouts
from p2pllm.swarm.records import RUNS_KEY, Progress, progress_key, seal
from tests.swarm.processes import LOOPBACK, TINY

pytestmark = [
    pytest.mark.swarm,
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning"),  # hivemind's own
]


class Nodes:
    """Real nodes in one event loop: two honest ones, of which one founded a run, and a liar."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self.owner = Identity.ephemeral()
        self.manifest = Manifest.found(load_run(TINY), self.owner)

    async def start(self) -> "Nodes":
        self.founder = await self.join(self.owner)
        [self.door] = await self.founder.addresses()
        self.honest = await self.join(Identity.ephemeral(), self.door)
        self.liar = await self.join(Identity.ephemeral(), self.door)
        self.liar._node.protocol.record_validator = None
        soon, self.later = self.founder.now() + 60, self.founder.now() + 600
        assert await self.founder.put(RUNS_KEY, self.manifest.run_id, self.manifest.pack(), soon)
        return self

    async def join(self, identity: Identity, *initial_peers: str) -> HivemindNetwork:
        config = NetworkConfig(host_maddrs=(LOOPBACK,), initial_peers=initial_peers)
        node = await HivemindNetwork.start(identity, config, Timeouts())
        self._stack.push_async_callback(node.close)
        return node

    async def seen_by_all(self, key: str) -> list[dict[str, bytes]]:
        """What the honest nodes read, and somebody who comes in through the liar."""
        [way_in] = await self.liar.addresses()
        newcomer = await self.join(Identity.ephemeral(), way_in)
        return [await node.get(key) for node in (self.founder, self.honest, newcomer)]


@asynccontextmanager
async def nodes():
    async with AsyncExitStack() as stack:
        yield await Nodes(stack).start()


async def test_a_tampered_manifest_reaches_nobody():
    async with nodes() as here:
        run_id, genuine = here.manifest.run_id, here.manifest.pack()
        changed = here.manifest.run.model_copy(update={"rounds": 9999})
        tampered = Manifest(changed, here.owner.peer_id, here.manifest.signature).pack()
        await here.liar.put(RUNS_KEY, run_id, tampered, here.later)
        assert (await here.liar.get(RUNS_KEY))[run_id] == tampered  # it does tell this to others
        for seen in await here.seen_by_all(RUNS_KEY):
            assert seen == {run_id: genuine}


async def test_another_owner_cannot_take_over_a_run_id():
    async with nodes() as here:
        run_id, genuine = here.manifest.run_id, here.manifest.pack()
        theirs = Manifest.found(here.manifest.run, Identity.ephemeral()).pack()
        await here.liar.put(RUNS_KEY, run_id, theirs, here.later)
        for seen in await here.seen_by_all(RUNS_KEY):
            assert seen == {run_id: genuine}


async def test_a_plain_value_in_the_place_of_the_runs_hides_nothing():
    async with nodes() as here:
        node = here.liar._node
        await node.store(RUNS_KEY, b"\x93\x00\x00\x00", here.later)
        for seen in await here.seen_by_all(RUNS_KEY):
            assert seen == {here.manifest.run_id: here.manifest.pack()}


async def test_nobody_speaks_for_another_peer():
    async with nodes() as here:
        key, victim, liar = progress_key(here.manifest.run_id), here.honest.me, here.liar
        said = Progress(peer=victim, name="bob", role="trainer", state="leaving", round=0)
        forged = seal(Identity.ephemeral(), key, victim, said, here.later)
        await liar.put(key, victim, forged, here.later)
        for seen in await here.seen_by_all(key):
            assert victim not in seen
