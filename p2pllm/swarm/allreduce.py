"""One attempt at a round's all-reduce: a butterfly in which every dialable member reduces one part.

For each ordered pair (sender, reducer) there is one stream. The sender streams its slice of the
delta in chunks; the reducer adds each chunk as it comes, and as soon as a chunk has come from
everybody its average goes back, the same bytes to all. A part counts only when the reducer closes
it with OK, which it does after every contribution has passed the guards of `reducer.py`.

Whatever goes wrong, anywhere, aborts the attempt and names a culprit. The caller either gets the
complete average or none of it. Reference: butterfly (recursive) reduce-scatter and all-gather,
Thakur et al. 2005, "Optimization of Collective Communication Operations in MPICH".
"""

import asyncio
import contextlib
import math
import statistics
import struct
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from p2pllm.swarm.codec import CHUNK, Floats, chunks, decode, encode, encoded_size
from p2pllm.swarm.group import Group
from p2pllm.swarm.network import (
    NetworkError,
    PeerId,
    Stream,
    Streams,
    Timeouts,
    dial,
    loop_time,
    receive,
    send,
    send_message,
)
from p2pllm.swarm.reducer import NORM_SLACK, AttemptFailed, Reducer, decoded, squares

REDUCE = "p2pllm/reduce"  # the stream protocol's name
# The first byte of a frame. A sender's: a chunk of its delta. A reducer's: a chunk of the average,
# that it waits for somebody else, that all is well. Anybody's: why the attempt is over.
_DELTA, _CHUNK, _WAIT, _OK, _ABORT = b"d", b"c", b"w", b"k", b"a"
_RATE = struct.Struct("<d")  # behind _OK: bytes per second in which the contribution came
_LONGEST_FRAME = 5 + encoded_size(CHUNK, "none")
_PATIENCE = 6  # times the longest silence, without a chunk from a reducer that waits for others
_TIMED = 4  # chunks of a contribution that tell how fast a line is

T = TypeVar("T")


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
        self._network, self._timeouts = network, timeouts
        self._me = network.me
        self._delta = delta
        self._rounding = None
        if group.compression == "int8":
            self._rounding = np.zeros_like(delta) if rounding is None else rounding.copy()
        self._average = np.zeros_like(delta)
        self._reducer = Reducer(group, self._me, delta, self._rounding)
        self._others = [m for m in group.members if m.peer != self._me]
        loop = asyncio.get_running_loop()
        self._reduced: list[asyncio.Future[bytes]] = [
            loop.create_future() for _ in self._reducer.pieces
        ]
        self._verdict: asyncio.Future[None] = loop.create_future()
        self._arrived: dict[PeerId, asyncio.Event] = {m.peer: asyncio.Event() for m in self._others}
        self._arrival_rates: dict[PeerId, float] = {}  # bytes per second of each contribution
        self._served: set[asyncio.Task[None]] = set()
        self._open: set[Stream] = set()  # to reducers that have not been told how it ended
        self._failure: AttemptFailed | None = None
        self._sent = self._received = 0
        self._rates: list[float] = []  # in which each reducer got our contribution

    # ---- the whole attempt

    async def run(self) -> Reduced:
        """Raises AttemptFailed. Returns, or raises, within the deadlines whatever others do."""
        self._contribute_own()
        try:
            async with asyncio.timeout(self._longest()):
                await self._do_all()
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
        self._average[self.group.part_of(self._me)] = self._reducer.average
        # All streams share our line, and most reducers' own lines were not in the way.
        uplink = statistics.median(self._rates) * len(self._rates) if self._rates else 0.0
        return Reduced(self._average, self._rounding, self._sent, self._received, uplink)

    async def _do_all(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                for member, part in zip(self.group.members, self.group.parts, strict=True):
                    if member.peer == self._me:
                        continue
                    if self._reducer.pieces:
                        tasks.create_task(self._await_arrival(member.peer))
                    if part:
                        tasks.create_task(self._exchange(member.peer))
                tasks.create_task(self._own_part_is_done())
        except ExceptionGroup as problems:
            failures, bugs = problems.split(AttemptFailed)
            if failures is None or bugs is not None:
                raise
            raise _first(failures) from None

    async def drain(self) -> None:
        """Wait until the other members have had their part, or know why there is none."""
        farewells = {asyncio.ensure_future(self._farewell(stream)) for stream in self._open}
        if waiting := farewells | self._served:
            await asyncio.wait(waiting, timeout=self._timeouts.silence)

    async def _farewell(self, stream: Stream) -> None:
        """Say why before hanging up, or we would be taken for dead."""
        with contextlib.suppress(NetworkError, TimeoutError):
            async with asyncio.timeout(self._timeouts.silence):
                await stream.send(self._reason())
                while True:  # until it hangs up: what is under way could be lost otherwise
                    await stream.receive(_LONGEST_FRAME)
        stream.close()

    def _reason(self) -> bytes:
        failure = self._failure or AttemptFailed(self._me, "it is leaving")
        return (_ABORT + f"{failure.culprit} {failure.reason}".encode())[:1000]

    def _longest(self) -> float:
        """An upper bound in seconds: a line of 50 kB/s for everything that we send and receive."""
        size = encoded_size(self._delta.size, self.group.compression)
        return 3 * self._timeouts.silence + 2 * size * len(self.group.members) / 50_000

    # ---- as a sender

    async def _exchange(self, reducer: PeerId) -> None:
        """Send our slice to one reducer, and take the average of it back."""
        part = self.group.part_of(reducer)
        try:
            stream = await dial(self._network, reducer, REDUCE, self._timeouts.dial, patient=True)
        except NetworkError as problem:
            raise AttemptFailed(reducer, f"dial failed: {problem}") from problem
        self._open.add(stream)
        try:
            await send_message(stream, group=self.group.id)
            sending = asyncio.ensure_future(self._send_slice(stream, part))
            try:
                await self._receive_average(stream, part)
                await sending
            finally:
                sending.cancel()
            with contextlib.suppress(NetworkError):  # tells the reducer that it may hang up
                await send(stream, b"thanks", self._timeouts.silence)
        except NetworkError as problem:
            raise AttemptFailed(reducer, f"lost while averaging: {problem}") from problem
        finally:
            self._count(stream)
        self._open.discard(stream)
        stream.close()

    async def _send_slice(self, stream: Stream, part: slice) -> None:
        for piece in chunks(part.stop - part.start):
            frame = self._encoded(slice(part.start + piece.start, part.start + piece.stop))
            await send(stream, _DELTA + frame, 2 * self._timeouts.silence)

    def _encoded(self, piece: slice) -> bytes:
        """One chunk for the wire. What rounding takes from it is added in the next round."""
        if self._rounding is None:
            return encode(self._delta[piece], self.group.compression)
        values = self._delta[piece] + self._rounding[piece]
        frame = encode(values, self.group.compression)
        self._rounding[piece] = values - decode(frame, self.group.compression)
        return frame

    async def _receive_average(self, stream: Stream, part: slice) -> None:
        values = self._average[part]
        for piece in chunks(values.size):
            size = values[piece].size
            payload = await self._reply(stream, _CHUNK, encoded_size(size, self.group.compression))
            values[piece] = decoded(payload, size, stream.peer, self.group)
        await self._receive_ok(stream)
        norm = math.sqrt(squares(values))
        if not math.isfinite(norm):
            raise AttemptFailed(stream.peer, "its average is not finite")
        if norm > self.group.longest_average(stream.peer) * NORM_SLACK + 1e-6:
            raise AttemptFailed(stream.peer, "its average is larger than any that it can have")

    async def _receive_ok(self, stream: Stream) -> None:
        frame = await self._reply(stream, _OK, _RATE.size)
        if len(frame) != _RATE.size:
            raise AttemptFailed(stream.peer, "does not speak the protocol")
        rate = _RATE.unpack(frame)[0]
        if math.isfinite(rate) and rate > 0:
            self._rates.append(rate)

    async def _reply(self, stream: Stream, kind: bytes, size: int) -> memoryview:
        """The content of a frame of this kind. Raises AttemptFailed when the reducer aborts."""
        frame = await self._awaited(stream, size)
        return self._content(stream, frame, kind)

    def _content(self, stream: Stream, frame: bytes, kind: bytes) -> memoryview:
        if frame[:1] == kind:
            return memoryview(frame)[1:]
        if frame[:1] != _ABORT:
            raise AttemptFailed(stream.peer, "sent more or less than its part")
        culprit, _, reason = frame[1:].decode(errors="replace").partition(" ")
        known = culprit in self.group.peers
        raise AttemptFailed(culprit if known else stream.peer, reason[:200])

    async def _awaited(self, stream: Stream, size: int) -> bytes:
        """The next frame that says something. A reducer may wait for a slow line, not for ever."""
        try:
            async with asyncio.timeout(_PATIENCE * self._timeouts.silence):
                while True:
                    frame = await receive(stream, max(size, 1024) + 1, self._timeouts.silence)
                    if frame != _WAIT:
                        return frame
        except TimeoutError:
            raise AttemptFailed(stream.peer, "only ever says that it waits") from None

    # ---- as a reducer

    async def serve(self, stream: Stream) -> None:
        """Handle the stream of one member: take its slice, give back the average."""
        if stream.peer not in self._arrived or self._arrived[stream.peer].is_set():
            return  # not of this group, or a second time
        self._arrived[stream.peer].set()
        task = asyncio.current_task()
        assert task is not None
        self._served.add(task)
        task.add_done_callback(self._served.discard)
        taking = asyncio.ensure_future(self._take_contribution(stream))
        try:
            await self._give_average(stream)
        except AttemptFailed:
            taking.cancel()
            await asyncio.wait((taking,))  # a stream has one reader at a time
            await self._farewell(stream)
        finally:
            taking.cancel()
            self._count(stream)

    async def _give_average(self, stream: Stream) -> None:
        for reduced in self._reduced:
            frame = await self._ready(reduced, stream)
            await send(stream, _CHUNK + frame, 2 * self._timeouts.silence)
        await self._ready(self._verdict, stream)
        rate = _RATE.pack(self._arrival_rates.get(stream.peer, 0.0))
        await send(stream, _OK + rate, self._timeouts.silence)
        # Hanging up at once could drop what is still under way; wait until it has been read.
        await receive(stream, 64, self._timeouts.silence)

    async def _ready(self, future: "asyncio.Future[T]", stream: Stream) -> T:
        """Its result. Until then, tell the member now and then that we are there."""
        while not future.done():
            done, _ = await asyncio.wait((future,), timeout=self._timeouts.heartbeat)
            if not done:
                await send(stream, _WAIT, self._timeouts.silence)
        return future.result()

    async def _take_contribution(self, stream: Stream) -> None:
        """Any failure here aborts the attempt: a contribution counts in all parts or in none."""
        reducer = self._reducer
        try:
            began, first = 0.0, 0
            for at, piece in enumerate(reducer.pieces):
                limit = encoded_size(piece.stop - piece.start, self.group.compression)
                frame = await receive(stream, max(limit, 1024) + 1, self._timeouts.silence)
                chunk = self._content(stream, frame, _DELTA)
                if at == 0:
                    began, first = loop_time(), stream.bytes_received
                self._give_to_all(at, reducer.add(at, stream.peer, chunk))
            if len(reducer.pieces) >= _TIMED:
                came = stream.bytes_received - first
                self._arrival_rates[stream.peer] = came / max(loop_time() - began, 1e-6)
            reducer.close(stream.peer)
        except AttemptFailed as failure:
            self._abort(failure)
        except NetworkError as problem:
            self._abort(AttemptFailed(stream.peer, f"died while sending: {problem}"))
        else:
            self._pass_verdict()

    def _contribute_own(self) -> None:
        for at in range(len(self._reducer.pieces)):
            self._give_to_all(at, self._reducer.add_own(at))
        if self._reducer.pieces:
            self._reducer.close(self._me)
        self._pass_verdict()

    def _give_to_all(self, at: int, average: bytes | None) -> None:
        if average is not None and not self._reduced[at].done():
            self._reduced[at].set_result(average)

    def _pass_verdict(self) -> None:
        if not self._reducer.waits_for and not self._verdict.done():
            self._verdict.set_result(None)

    async def _await_arrival(self, peer: PeerId) -> None:
        try:
            async with asyncio.timeout(self._timeouts.dial + self._timeouts.silence):
                await self._arrived[peer].wait()
        except TimeoutError:
            raise AttemptFailed(peer, "joined the group and then said nothing") from None

    async def _own_part_is_done(self) -> None:
        await asyncio.shield(self._verdict)

    # ---- both

    def _abort(self, failure: AttemptFailed) -> None:
        self._failure = self._failure or failure
        waiting: list[asyncio.Future[Any]] = [*self._reduced, self._verdict]
        for future in waiting:
            if not future.done():
                future.set_exception(failure)
                future.exception()  # it may have no reader left: that is fine

    def _slowest(self) -> PeerId:
        late = list(self._reducer.waits_for) or [m.peer for m in self._others]
        return min(late)

    def _count(self, stream: Stream) -> None:
        self._sent += stream.bytes_sent
        self._received += stream.bytes_received


def _first(failures: ExceptionGroup[AttemptFailed]) -> AttemptFailed:
    """The failure that says most: one that a reducer reported rather than a lost stream."""
    found = [f for f in failures.exceptions if isinstance(f, AttemptFailed)]
    return min(found, key=lambda f: f.reason.startswith(("dial failed", "lost while")))
