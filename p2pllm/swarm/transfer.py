"""Catching up: the committed adapter, from several who hold it at once.

The digest is a hash over the hashes of the adapter's leaves (`digest.py`), so every leaf is checked
when it comes, and a donor that sends anything else, or falls silent, costs no more than that leaf.
"""

import asyncio
from collections import deque
from collections.abc import Sequence

import numpy as np

from p2pllm.digest import LEAF, LEAF_HASH, leaf_of, leaves_of, root_of
from p2pllm.swarm.codec import Floats
from p2pllm.swarm.network import (
    NetworkError,
    PeerId,
    Stream,
    Streams,
    Timeouts,
    dial,
    receive,
    receive_message,
    send,
    send_message,
)
from p2pllm.swarm.rounds import Anchor

ADAPTER = "p2pllm/adapter"  # the stream protocol's name
_KEPT = 2  # anchors that we hand out: the newest, and the one before for those still reading it
_DONORS = 4  # asked at the same time
_AHEAD = 32  # leaves asked of one donor before the first has come: 2 MB, 100 Mbit/s at 160 ms
_ASKED = 2  # donors of whom one leaf is asked, so that the last ones do not wait for the slowest


class Shelf:
    """The adapters that this peer hands to others."""

    def __init__(self, timeouts: Timeouts) -> None:
        self._timeouts = timeouts
        self._held: dict[Anchor, Floats] = {}
        self._leaves: dict[Anchor, bytes] = {}

    def hold(self, anchor: Anchor, values: Floats) -> None:
        self._held[anchor] = values
        for stale in list(self._held)[:-_KEPT]:
            del self._held[stale]
            self._leaves.pop(stale, None)

    async def serve(self, stream: Stream) -> None:
        message = await receive_message(stream, self._timeouts.silence)
        anchor = Anchor(int(message.get("round", -1)), str(message.get("digest")))
        values = self._held.get(anchor)
        if values is None:
            await send_message(stream, size=0)
            await receive(stream, 64, self._timeouts.silence)  # until it has read that
            return
        if anchor not in self._leaves:
            self._leaves[anchor] = await asyncio.to_thread(leaves_of, values)
        leaves = self._leaves[anchor]
        await send_message(stream, size=int(values.size), leaves=leaves)
        while True:  # until it hangs up, or asks for nothing any more
            wish = (await receive_message(stream, 2 * self._timeouts.silence)).get("leaf")
            if not isinstance(wish, int) or not 0 <= wish * LEAF < values.size:
                raise NetworkError(f"{stream.peer} asked for something that is not a leaf")
            leaf = values[wish * LEAF : (wish + 1) * LEAF]
            data = leaf.astype("<f4", copy=False).data.cast("B")
            await send(stream, data, 2 * self._timeouts.silence)


async def fetch(
    network: Streams, donors: Sequence[PeerId], anchor: Anchor, size: int, timeouts: Timeouts
) -> tuple[Floats, tuple[PeerId, ...]]:
    """The adapter `anchor`, (size,) float32, and who delivered parts of it.

    Raises NetworkError when none of the donors can deliver what is missing.
    """
    download = _Download(network, anchor, size, timeouts)
    await download.run(list(donors))
    return download.values, tuple(download.delivered)


class _Download:
    """One adapter while it arrives."""

    def __init__(self, network: Streams, anchor: Anchor, size: int, timeouts: Timeouts) -> None:
        self.values = np.empty(size, np.float32)
        self.delivered: dict[PeerId, int] = {}  # leaves
        self._network, self._anchor, self._timeouts = network, anchor, timeouts
        self._missing = dict.fromkeys(range(-(-size // LEAF)), 0)  # leaf -> of how many it is asked
        self._problem = "nobody who holds this adapter can be dialled"

    async def run(self, donors: list[PeerId]) -> None:
        """Raises NetworkError when there is no donor left."""
        asking: dict[asyncio.Task[bool], PeerId] = {}
        idle: list[PeerId] = []  # the others have been asked for all that is missing
        try:
            while self._missing:
                if not all(self._missing.values()):
                    donors, idle = donors + idle, []
                while donors and len(asking) < _DONORS:
                    donor = donors.pop(0)
                    asking[asyncio.ensure_future(self._ask(donor))] = donor
                if not asking:
                    raise NetworkError(self._problem)
                done, _ = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
                idle += [asking[task] for task in done if task.result()]
                for task in done:
                    del asking[task]
        finally:
            for task in asking:
                task.cancel()

    async def _ask(self, donor: PeerId) -> bool:
        """Whether it did its part."""
        asked: deque[int] = deque()
        try:
            stream = await dial(self._network, donor, ADAPTER, self._timeouts.dial)
            try:
                await self._take_from(stream, asked)
            finally:
                stream.close()
        except NetworkError as problem:
            self._problem = str(problem)
            return False
        finally:
            for leaf in asked:
                if leaf in self._missing:
                    self._missing[leaf] -= 1
        return True

    async def _take_from(self, stream: Stream, asked: deque[int]) -> None:
        anchor = self._anchor
        await send_message(stream, round=anchor.round, digest=anchor.digest)
        offer = await receive_message(stream, self._timeouts.silence)
        size, leaves = offer.get("size"), offer.get("leaves")
        if size != self.values.size:
            raise NetworkError(
                f"{stream.peer} does not hold this adapter (it offers {size} values)"
            )
        if not isinstance(leaves, bytes) or root_of(leaves) != anchor.digest:
            raise NetworkError(f"{stream.peer} offered an adapter with another digest")
        while self._missing:
            while len(asked) < _AHEAD and (leaf := self._next(asked)) is not None:
                asked.append(leaf)
                self._missing[leaf] += 1
                await send_message(stream, leaf=leaf)
            if not asked:
                return
            place = self.values[asked[0] * LEAF : (asked[0] + 1) * LEAF]
            frame = await receive(stream, place.nbytes, self._timeouts.silence)
            self._put(stream.peer, asked, frame, leaves)

    def _next(self, asked: deque[int]) -> int | None:
        """A leaf that nobody has been asked for; for one who would be idle, one that is late."""
        most = 0 if asked else _ASKED - 1
        wanted = (leaf for leaf, count in self._missing.items() if count <= most)
        return min(wanted, key=lambda leaf: self._missing[leaf], default=None)

    def _put(self, donor: PeerId, asked: deque[int], frame: bytes, leaves: bytes) -> None:
        leaf = asked[0]
        place = self.values[leaf * LEAF : (leaf + 1) * LEAF]
        if len(frame) != place.nbytes:
            raise NetworkError(f"{donor} sent a leaf of the wrong size")
        received = np.frombuffer(frame, "<f4")
        if leaf_of(received) != leaves[leaf * LEAF_HASH : (leaf + 1) * LEAF_HASH]:
            raise NetworkError(f"{donor} sent values that are not of this adapter")
        asked.popleft()
        if self._missing.pop(leaf, None) is not None:
            place[:] = received
            self.delivered[donor] = self.delivered.get(donor, 0) + 1
