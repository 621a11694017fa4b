"""A member of an attempt and a reducer, over one stream: the member sends its slice of the
reducer's part in chunks, and gets the average of each chunk when it has come from everybody.
"""

import asyncio
import contextlib
import math
import struct
from typing import Any, TypeVar

import numpy as np

from p2pllm.swarm.codec import CHUNK, Floats, chunks, decode, encode, encoded_size
from p2pllm.swarm.group import Group
from p2pllm.swarm.network import (
    NetworkError,
    PeerId,
    Stream,
    Timeouts,
    loop_time,
    receive,
    send,
)
from p2pllm.swarm.reducer import NORM_SLACK, AttemptFailed, Reducer, decoded, squares

# The first byte of a frame. A chunk of a delta; a chunk of an average; that it waits for somebody
# else; that its part is complete; that it has all it needs; why the attempt is over.
_DELTA, _CHUNK, _WAIT, _OK, _THANKS, _ABORT = b"d", b"c", b"w", b"k", b"t", b"a"
_RATE = struct.Struct("<d")  # behind _OK: bytes per second in which the contribution came
_LONGEST_FRAME = 5 + encoded_size(CHUNK, "none")
_PATIENCE = 6  # times the longest silence, without a chunk from a reducer that waits for others
_TIMED = 4  # chunks of a contribution that tell how fast a line is

T = TypeVar("T")


class Work:
    """What all exchanges of one attempt share: what we contribute, our part of the average while
    it grows, and the parts that come from the others."""

    def __init__(self, group: Group, me: PeerId, delta: Floats, rounding: Floats | None) -> None:
        """delta, rounding: (size,); what compression lost of earlier rounds is offered again."""
        self.group, self.me = group, me
        self._delta = delta
        self.rounding = None
        if group.compression == "int8":
            self.rounding = np.zeros_like(delta) if rounding is None else rounding.copy()
        self.average = np.empty_like(delta)
        self._reducer = Reducer(group, me, delta, self.rounding, self.average)
        self.pieces = self._reducer.pieces
        loop = asyncio.get_running_loop()
        self.reduced: list[asyncio.Future[bytes]] = [loop.create_future() for _ in self.pieces]
        self.complete: asyncio.Future[None] = loop.create_future()  # our part, from everybody
        self.rates: list[float] = []  # bytes per second in which each reducer got our contribution

    @property
    def waits_for(self) -> set[PeerId]:
        return self._reducer.waits_for

    def encoded(self, piece: slice) -> bytes:
        """One chunk for the wire. What rounding takes from it is added in the next round."""
        if self.rounding is None:
            return encode(self._delta[piece], self.group.compression)
        values = self._delta[piece] + self.rounding[piece]
        frame = encode(values, self.group.compression)
        self.rounding[piece] = values - decode(frame, self.group.compression)
        return frame

    def add_own(self) -> None:
        for at in range(len(self.pieces)):
            self.pass_on(at, self._reducer.add_own(at))
        self.close(self.me)

    def add(self, at: int, sender: PeerId, frame: memoryview) -> None:
        """Raises AttemptFailed."""
        self.pass_on(at, self._reducer.add(at, sender, frame))

    def close(self, sender: PeerId) -> None:
        """Its contribution has come. Raises AttemptFailed when it does not pass the guards."""
        if self.pieces:
            self._reducer.close(sender)
        if not self._reducer.waits_for and not self.complete.done():
            self.complete.set_result(None)

    def pass_on(self, at: int, average: bytes | None) -> None:
        """To everybody, when the chunk has come from all."""
        if average is not None and not self.reduced[at].done():
            self.reduced[at].set_result(average)

    def fail(self, failure: AttemptFailed) -> None:
        """Nobody needs to wait any longer."""
        waiting: list[asyncio.Future[Any]] = [*self.reduced, self.complete]
        for future in waiting:
            if not future.done():
                future.set_exception(failure)
                future.exception()  # it may have no reader left: that is fine


class Exchange:
    """One side of the stream; `Offer` and `Service` are the two."""

    def __init__(self, stream: Stream, work: Work, timeouts: Timeouts) -> None:
        self.stream, self._work, self._timeouts = stream, work, timeouts
        self._group = work.group
        self._giving: asyncio.Task[None] | None = None
        self.hung_up = asyncio.Event()

    async def run(self) -> None:
        """Until we have all that we need of the other; raises AttemptFailed. To be ended by `part`
        or `farewell`."""
        self._giving = asyncio.create_task(self._give())
        await self._take()

    async def part(self) -> None:
        """Give the other the rest of its due, and hang up when it has all of it."""
        assert self._giving is not None
        with contextlib.suppress(NetworkError, AttemptFailed):
            await self._giving
            await send(self.stream, _THANKS, self._timeouts.silence)
            await self._receive(0)  # hanging up sooner could drop what is under way
        self._hang_up()

    async def farewell(self, failure: AttemptFailed) -> None:
        """Say why before hanging up, or we would be taken for dead."""
        if self._giving is not None:
            self._giving.cancel()
            await asyncio.gather(self._giving, return_exceptions=True)
        with contextlib.suppress(NetworkError, TimeoutError):
            async with asyncio.timeout(self._timeouts.silence):
                reason = f"{failure.culprit} {failure.reason}".encode()
                await self.stream.send((_ABORT + reason)[:1000])
                while True:  # until it hangs up: what is under way could be lost otherwise
                    await self.stream.receive(_LONGEST_FRAME)
        self._hang_up()

    def _hang_up(self) -> None:
        self.stream.close()
        self.hung_up.set()

    async def _give(self) -> None:
        """Raises NetworkError, AttemptFailed."""
        raise NotImplementedError

    async def _take(self) -> None:
        """Raises AttemptFailed."""
        raise NotImplementedError

    async def _send(self, frame: bytes) -> None:
        await send(self.stream, frame, 2 * self._timeouts.silence)

    async def _receive(self, size: int) -> bytes:
        """A frame with a content of at most this size, or with a reason."""
        return await receive(self.stream, max(size, 1024) + 1, self._timeouts.silence)

    def _content(self, frame: bytes, kind: bytes) -> memoryview:
        """Raises AttemptFailed when it is of another kind, with the reason when it is an abort."""
        if frame[:1] == kind:
            return memoryview(frame)[1:]
        if frame[:1] != _ABORT:
            raise AttemptFailed(self.stream.peer, "sent more or less than its part")
        culprit, _, reason = frame[1:].decode(errors="replace").partition(" ")
        known = culprit in self._group.peers
        raise AttemptFailed(culprit if known else self.stream.peer, reason[:200])


class Service(Exchange):
    """The reducer's side."""

    _rate = 0.0  # bytes per second in which the contribution came; 0: too few chunks to tell

    async def _give(self) -> None:
        for reduced in self._work.reduced:
            frame = await self._ready(reduced)
            await self._send(_CHUNK + frame)
        await self._ready(self._work.complete)
        await self._send(_OK + _RATE.pack(self._rate))

    async def _ready(self, future: "asyncio.Future[T]") -> T:
        """Its result. Until then, tell the other now and then that we are there."""
        while not future.done():
            done, _ = await asyncio.wait((future,), timeout=self._timeouts.heartbeat)
            if not done:
                await self._send(_WAIT)
        return future.result()

    async def _take(self) -> None:
        try:
            began, first = 0.0, 0
            for at, piece in enumerate(self._work.pieces):
                size = encoded_size(piece.stop - piece.start, self._group.compression)
                chunk = self._content(await self._receive(size), _DELTA)
                if at == 0:
                    began, first = loop_time(), self.stream.bytes_received
                self._work.add(at, self.stream.peer, chunk)
        except NetworkError as problem:
            raise AttemptFailed(self.stream.peer, f"died while sending: {problem}") from problem
        if len(self._work.pieces) >= _TIMED:
            came = self.stream.bytes_received - first
            self._rate = came / max(loop_time() - began, 1e-6)
        self._work.close(self.stream.peer)


class Offer(Exchange):
    """The side of a member that sends its slice to a reducer."""

    @property
    def _part(self) -> slice:
        return self._group.part_of(self.stream.peer)

    async def _give(self) -> None:
        part = self._part
        for piece in chunks(part.stop - part.start):
            piece = slice(part.start + piece.start, part.start + piece.stop)
            await self._send(_DELTA + self._work.encoded(piece))

    async def _take(self) -> None:
        values, peer = self._work.average[self._part], self.stream.peer
        try:
            for piece in chunks(values.size):
                size = values[piece].size
                payload = await self._reply(_CHUNK, encoded_size(size, self._group.compression))
                values[piece] = decoded(payload, size, peer, self._group)
            self._note_rate(await self._reply(_OK, _RATE.size))
        except NetworkError as problem:
            raise AttemptFailed(peer, f"lost while averaging: {problem}") from problem
        norm = math.sqrt(squares(values))
        if not math.isfinite(norm):
            raise AttemptFailed(peer, "its average is not finite")
        if norm > self._group.longest_average(peer) * NORM_SLACK + 1e-6:
            raise AttemptFailed(peer, "its average is larger than any that it can have")

    def _note_rate(self, content: memoryview) -> None:
        if len(content) != _RATE.size:
            raise AttemptFailed(self.stream.peer, "does not speak the protocol")
        rate = _RATE.unpack(content)[0]
        if math.isfinite(rate) and rate > 0:
            self._work.rates.append(rate)

    async def _reply(self, kind: bytes, size: int) -> memoryview:
        """The content of the next frame that says something. A reducer may wait for a slow line,
        not for ever."""
        try:
            async with asyncio.timeout(_PATIENCE * self._timeouts.silence):
                while (frame := await self._receive(size)) == _WAIT:
                    pass
        except TimeoutError:
            raise AttemptFailed(self.stream.peer, "only ever says that it waits") from None
        return self._content(frame, kind)
