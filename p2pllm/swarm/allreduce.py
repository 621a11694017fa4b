"""One attempt at a round's all-reduce: a butterfly in which every dialable member reduces one part.

For each ordered pair (member, reducer) there is one stream (`exchange.py`). The member streams its
slice of the delta in chunks; the reducer adds each chunk as it comes, and as soon as a chunk has
come from everybody its average goes back, the same bytes to all. A part counts only when the
reducer closes it with OK, which it does after every contribution has passed the guards of
`reducer.py`.

Whatever goes wrong, anywhere, aborts the attempt and names a culprit. The caller either gets the
complete average or none of it. Reference: butterfly (recursive) reduce-scatter and all-gather,
Thakur et al. 2005, "Optimization of Collective Communication Operations in MPICH".
"""

import asyncio
import statistics
from dataclasses import dataclass

from p2pllm.swarm.codec import Floats, encoded_size
from p2pllm.swarm.exchange import Exchange, Offer, Service, Work
from p2pllm.swarm.group import Group
from p2pllm.swarm.network import (
    NetworkError,
    PeerId,
    Stream,
    Streams,
    Timeouts,
    dial,
    in_background,
    send_message,
)
from p2pllm.swarm.reducer import AttemptFailed

REDUCE = "p2pllm/reduce"  # the stream protocol's name


@dataclass(frozen=True)
class Reduced:
    """The complete average."""

    delta: Floats  # (size,)
    rounding: Floats | None  # (size,): what compression lost, for the next round; int8 only
    bytes_sent: int
    bytes_received: int
    uplink: float  # bytes per second in which our contributions arrived; 0: too few to tell


class AllReduce:
    """This peer's side of one attempt."""

    def __init__(
        self,
        group: Group,
        network: Streams,
        delta: Floats,
        rounding: Floats | None,
        timeouts: Timeouts,
    ) -> None:
        """rounding: what compression lost of earlier rounds; it is offered again."""
        self.group = group
        self.work = Work(group, network.me, delta, rounding)
        self._network, self._timeouts, self._me = network, timeouts, network.me
        self._size = encoded_size(delta.size, group.compression)
        others = [m.peer for m in group.members if m.peer != network.me]
        self._reducers = [peer for peer in others if group.parts[group.peers.index(peer)]]
        loop = asyncio.get_running_loop()
        self._calls: dict[PeerId, asyncio.Future[Service]] = {
            peer: loop.create_future() for peer in others if self.work.pieces
        }
        self._exchanges: list[Exchange] = []
        self._parting: set[asyncio.Task[None]] = set()
        self._failure: AttemptFailed | None = None

    async def run(self) -> Reduced:
        """Raises AttemptFailed. Returns, or raises, within the deadlines whatever others do."""
        try:
            self.work.add_own()
            async with asyncio.timeout(self._longest()):
                await self._run_all()
        except TimeoutError:
            failure = AttemptFailed(self._slowest(), "the round took too long")
            self._abort(failure)
            raise failure from None
        except AttemptFailed as failure:
            self._abort(failure)
            raise
        except asyncio.CancelledError:
            self._abort(AttemptFailed(self._me, "it is leaving"))
            raise
        return self._reduced()

    async def _run_all(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                for peer in self._calls:
                    tasks.create_task(self._serve_to(peer))
                for peer in self._reducers:
                    tasks.create_task(self._offer_to(peer))
        except ExceptionGroup as problems:
            failures, bugs = problems.split(AttemptFailed)
            if failures is None or bugs is not None:
                raise
            raise _first(failures) from None

    async def _offer_to(self, reducer: PeerId) -> None:
        try:
            stream = await dial(self._network, reducer, REDUCE, self._timeouts.dial, patient=True)
            offer = Offer(stream, self.work, self._timeouts)
            self._exchanges.append(offer)
            await send_message(stream, group=self.group.id)
        except NetworkError as problem:
            raise AttemptFailed(reducer, f"dial failed: {problem}") from problem
        await self._run_one(offer)

    async def _serve_to(self, peer: PeerId) -> None:
        try:
            async with asyncio.timeout(self._timeouts.dial + self._timeouts.silence):
                service = await asyncio.shield(self._calls[peer])
        except TimeoutError:
            raise AttemptFailed(peer, "joined the group and then said nothing") from None
        await self._run_one(service)

    async def _run_one(self, exchange: Exchange) -> None:
        await exchange.run()
        in_background(exchange.part(), self._parting)

    async def serve(self, stream: Stream) -> None:
        """A member calls. Returns when the stream is no longer needed."""
        call = self._calls.get(stream.peer)
        if call is None or call.done():
            return  # not of this group, or a second time
        service = Service(stream, self.work, self._timeouts)
        self._exchanges.append(service)
        call.set_result(service)
        if self._failure is not None:
            await service.farewell(self._failure)
        await service.hung_up.wait()

    def _reduced(self) -> Reduced:
        work, streams = self.work, [exchange.stream for exchange in self._exchanges]
        # All streams share our line, and most reducers' own lines were not in the way.
        uplink = statistics.median(work.rates) * len(work.rates) if work.rates else 0.0
        sent = sum(stream.bytes_sent for stream in streams)
        received = sum(stream.bytes_received for stream in streams)
        return Reduced(work.average, work.rounding, sent, received, uplink)

    def _longest(self) -> float:
        """An upper bound in seconds: a line of 50 kB/s for everything that we send and receive."""
        return 3 * self._timeouts.silence + 2 * self._size * len(self.group.members) / 50_000

    def _slowest(self) -> PeerId:
        return min(self.work.waits_for or self._reducers)

    def _abort(self, failure: AttemptFailed) -> None:
        self._failure = failure
        self.work.fail(failure)

    async def drain(self) -> None:
        """Wait until the other members have had their part, or know why there is none."""
        if self._failure is not None:
            for task in (parting := tuple(self._parting)):
                task.cancel()
            await asyncio.gather(*parting, return_exceptions=True)  # a stream has one reader
            left = [e for e in self._exchanges if not e.hung_up.is_set()]
            await asyncio.gather(*(exchange.farewell(self._failure) for exchange in left))
        elif self._parting:
            await asyncio.wait(self._parting, timeout=self._longest())


def _first(failures: ExceptionGroup[AttemptFailed]) -> AttemptFailed:
    """The failure that says most: one that a reducer reported rather than a lost stream."""
    found = [f for f in failures.exceptions if isinstance(f, AttemptFailed)]
    return min(found, key=lambda f: f.reason.startswith(("dial failed", "lost while")))
