"""Some bytes on the lines of an all-reduce, just before it.

After an idle second TCP takes a line for a slow one, and doubles what it sends with every answer
until it knows better (slow start, RFC 5681, section 4.1). At 100 Mbit/s and 100 ms round trip that
costs 0.3 s of every round, and the waiting is the whole group's. So shortly before a local epoch
ends each peer goes through this with its last group, in bursts that nobody needs.
"""

import asyncio
import contextlib

from p2pllm.swarm.codec import encoded_size
from p2pllm.swarm.group import Group
from p2pllm.swarm.network import (
    NetworkError,
    PeerId,
    Stream,
    Streams,
    Timeouts,
    dial,
    in_background,
    loop_time,
    receive,
    send,
)

WARM_UP = "p2pllm/warm-up"  # the stream protocol's name
_LEAD = 0.5  # seconds before the end: a few round trips, and too little for TCP to forget them
_SHARE = 8  # at most one byte for so many of the round itself
_FIRST, _LARGEST = 1 << 14, 1 << 18  # bytes of a burst
_SHORT = 0.02  # seconds of a round trip with which slow start takes no time
_TOGETHER = 1.0  # seconds: where the first waits longer for the last, its lines are cold again
_GOT = b"g"


class WarmUp:
    """One peer's warm-ups: at most one in each local epoch."""

    def __init__(self, network: Streams, timeouts: Timeouts) -> None:
        self._network, self._timeouts = network, timeouts
        self._shares: dict[PeerId, int] = {}  # bytes at most, for each peer; until the warm-up
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def plan(self, last: Group | None) -> None:
        """A local epoch begins; `last` is the group of the one before."""
        self.end()
        if last is None or last.waited > _TOGETHER:
            return
        parts = dict(zip(last.peers, last.parts, strict=True))
        own = parts.pop(self._network.me)
        for peer, part in parts.items():
            # To it goes its part of our delta, and the average of our part.
            share = encoded_size(part + own, last.compression) // _SHARE
            if part and share >= _FIRST:
                self._shares[peer] = share

    def expect(self, seconds: float) -> None:
        """The local epoch ends in about so many seconds; a later word counts more."""
        if self._shares:
            if self._timer is not None:
                self._timer.cancel()
            delay = max(seconds - _LEAD, 0.0)
            self._timer = asyncio.get_running_loop().call_later(delay, self._begin)

    def end(self) -> None:
        """The lines are needed."""
        self._shares = {}
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()

    def _begin(self) -> None:
        shares, self._shares = self._shares, {}
        for peer, share in shares.items():
            in_background(self._warm(peer, share), self._tasks)

    async def _warm(self, peer: PeerId, share: int) -> None:
        with contextlib.suppress(NetworkError):  # the round will say who is gone
            stream = await dial(self._network, peer, WARM_UP, self._timeouts.dial)
            try:
                await self._send_bursts(stream, share)
            finally:
                stream.close()

    async def _send_bursts(self, stream: Stream, share: int) -> None:
        burst = _FIRST
        while burst <= min(share, _LARGEST):
            began = loop_time()
            await send(stream, bytes(burst), self._timeouts.silence)
            await receive(stream, len(_GOT), self._timeouts.silence)
            if loop_time() - began < _SHORT:
                return
            share -= burst
            burst *= 2

    async def serve(self, stream: Stream) -> None:
        """Another one warms up: its bytes are only counted."""
        left = 2 * _LARGEST
        while left > 0:
            left -= len(await receive(stream, _LARGEST, self._timeouts.silence))
            await send(stream, _GOT, self._timeouts.silence)
