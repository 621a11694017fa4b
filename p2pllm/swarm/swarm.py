"""The seam between the roles and the swarm: plain calls, answered from the network's own thread.

A role never sees a socket, a coroutine or hivemind. Every call returns within a deadline; a call
that waits for other peers also returns, with None, as soon as the peer is asked to stop.
"""

import asyncio
import concurrent.futures
import logging
import math
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, TypeVar

from p2pllm.errors import NetworkDown
from p2pllm.swarm.codec import Floats
from p2pllm.swarm.identity import Identity
from p2pllm.swarm.manifest import Manifest
from p2pllm.swarm.network import Network, PeerId, Timeouts
from p2pllm.swarm.node import Averaged, Contribution, Missed, Node
from p2pllm.swarm.observer import Observer
from p2pllm.swarm.records import RUNS_KEY, Progress, Results
from p2pllm.swarm.rounds import Anchor, CatchUp, SwarmView
from p2pllm.swarm.shared_records import SharedRecords

T = TypeVar("T")
_POLL = 0.1  # seconds between two looks at the stop signal
_LONGEST = 60.0  # seconds for calls that only ask our own network
_GRACE = 3.0  # seconds in which cancelled work may clean up


class EventLoopThread:
    """One asyncio loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        # A library's forgotten task is for developers; users hear of failures where they matter.
        self.loop.set_exception_handler(
            lambda _, context: logging.getLogger(__name__).debug("in the loop: %s", context)
        )
        self._thread = threading.Thread(target=self._run, name="swarm", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.loop.run_forever()
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.run_until_complete(asyncio.sleep(0))  # lets them clean up
        self.loop.close()

    def submit(self, work: Coroutine[Any, Any, T]) -> "concurrent.futures.Future[T]":
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def close(self) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout=5)


class Pending(Generic[T]):
    """Work that waits for other peers, within deadlines of its own."""

    def __init__(self, future: "concurrent.futures.Future[T]", stop: threading.Event) -> None:
        self._future, self._stop = future, stop

    def is_done(self) -> bool:
        return self._future.done()

    def result(self) -> T | None:
        """Waits for it; None when this peer is asked to stop meanwhile."""
        while not self._stop.is_set():
            # Not result(_POLL): what it raises may be its own TimeoutError or the work's.
            if concurrent.futures.wait([self._future], _POLL).done:
                return self._future.result()
        self._future.cancel()
        concurrent.futures.wait([self._future], _GRACE)  # until its task has come to an end
        return None


class Swarm:
    """This peer's connection to the swarm. Open it, `enter` one run, and in the end `close` it."""

    def __init__(
        self,
        identity: Identity,
        open_network: Callable[[], Awaitable[Network]],
        timeouts: Timeouts,
        stop: threading.Event,
        thread: EventLoopThread | None = None,
    ) -> None:
        """Raises whatever `open_network` raises, and KeyboardInterrupt when `stop` is set before
        the network is open."""
        self.identity, self.timeouts, self.stop = identity, timeouts, stop
        self._owned = thread is None
        self._thread = thread or EventLoopThread()
        self._node: Node | None = None

        async def opened() -> Network:
            return await open_network()

        try:
            network = Pending(self._thread.submit(opened()), stop).result()
            if network is None:
                raise KeyboardInterrupt
        except BaseException:
            identity.release()
            self._end_thread()
            raise
        self._network: Network = network

    @property
    def me(self) -> PeerId:
        return self.identity.peer_id

    def addresses(self) -> list[str]:
        """Multiaddrs under which this peer can be dialled."""
        return self._call(self._network.addresses())

    def runs(self) -> dict[str, Manifest]:
        """The runs that the swarm knows, by run id; each with a valid signature of its owner."""
        found = self._call(self._network.get(RUNS_KEY))
        manifests = {run_id: Manifest.unpack(data) for run_id, data in found.items()}
        return {run_id: m for run_id, m in manifests.items() if m and m.run_id == run_id}

    def observe(self, manifest: Manifest) -> SwarmView:
        """What a run's records say, without taking part in it."""
        shared = SharedRecords(self._network, self.identity, manifest)
        return self._call(Observer(self._network, manifest.run_id, shared, self.timeouts).view())

    # ---- in a run

    def enter(
        self, manifest: Manifest, progress: Progress, on_trouble: Callable[[str], None]
    ) -> None:
        """Take part in a run: serve its manifest, answer its peers, renew our record."""
        node = Node(self._network, self.identity, manifest, self.timeouts)
        node.on_trouble = on_trouble
        self._node = node
        self._call(node.enter(progress))

    def view(self, max_age: float = 0.0) -> SwarmView:
        """The others' records, as they were at most so many seconds ago."""
        return self._call(self._in_run.observer.view(max_age))

    def announce(self, **changes: Any) -> None:
        """Change fields of our progress record."""
        self._soon(lambda node: node.announce(**changes))

    def approach(self, anchor: Anchor) -> None:
        """A local epoch on this anchor begins: find the group for it meanwhile."""
        self._soon(lambda node: node.approach(anchor))

    def expect_end(self, seconds: float) -> None:
        """The local epoch ends in about so many seconds: have the lines ready by then."""
        self._soon(lambda node: node.expect_end(seconds))

    def closes_in(self) -> float:
        """Seconds until this round's group closes without us; infinite while nobody waits."""
        at = self._in_run.closes_at
        return math.inf if at is None else at - self._thread.loop.time()

    def hold(self, anchor: Anchor, state: Floats, size: int, **said: Any) -> None:
        """We hold this state now, of which this round averages `size` values: say so, and hand it
        to who asks. `said`: other fields of our record that change in the same moment."""
        self._call(self._in_run.hold(anchor, state, size, **said))

    def average(self, contribution: Contribution) -> "Pending[Averaged | Missed]":
        """Begin one attempt at a round."""
        work = self._in_run.average(contribution)
        return Pending(self._thread.submit(work), self.stop)

    def catch_up(
        self, action: CatchUp, size: int
    ) -> tuple[Floats, tuple[PeerId, ...]] | Missed | None:
        """Download a committed state of `size` values; None when we were asked to stop."""
        work = self._in_run.catch_up(action, size)
        return Pending(self._thread.submit(work), self.stop).result()

    def designate(self, aggregator: PeerId, serial: int) -> None:
        """As the owner: name the aggregator rank. A later serial wins."""
        self._call(self._in_run.shared.designate(aggregator, serial))

    def publish(self, results: Results) -> None:
        """As the aggregator: announce the evaluations so far."""
        self._call(self._in_run.shared.publish(results))

    def close(self) -> None:
        """Say good-bye and end everything that we started. Never raises, never hangs."""
        for farewell in (self._node.leave() if self._node else None, self._network.close()):
            if farewell is not None:
                try:
                    self._thread.submit(farewell).result(2 * self.timeouts.record)
                except Exception:  # at the door out nothing may hold us up
                    logging.getLogger(__name__).debug("while closing", exc_info=True)
        self.identity.release()
        self._end_thread()

    @property
    def _in_run(self) -> Node:
        assert self._node is not None, "enter a run first"
        return self._node

    def _soon(self, change: Callable[[Node], None]) -> None:
        """For what nobody waits for. Calls are carried out in their order."""
        self._thread.loop.call_soon_threadsafe(change, self._in_run)

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        future = self._thread.submit(work)
        try:
            return future.result(_LONGEST)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise NetworkDown(reason=f"no answer within {_LONGEST:.0f} s") from None

    def _end_thread(self) -> None:
        if self._owned:
            self._thread.close()
