"""Catching up: the committed adapter, from whoever holds it, checked against its digest."""

import asyncio

import numpy as np

from p2pllm.digest import digest_of
from p2pllm.swarm.codec import Floats, chunks, decode, encode, encoded_size
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


class Shelf:
    """The adapters that this peer hands to others."""

    def __init__(self, timeouts: Timeouts) -> None:
        self._timeouts = timeouts
        self._held: dict[Anchor, Floats] = {}

    def hold(self, anchor: Anchor, values: Floats) -> None:
        self._held[anchor] = values
        for stale in list(self._held)[:-_KEPT]:
            del self._held[stale]

    async def serve(self, stream: Stream) -> None:
        message = await receive_message(stream, self._timeouts.silence)
        values = self._held.get(Anchor(int(message.get("round", -1)), str(message.get("digest"))))
        if values is None:
            await send_message(stream, size=0)
        else:
            await send_message(stream, size=int(values.size))
            for piece in chunks(values.size):
                await send(stream, encode(values[piece], "none"), self._timeouts.silence)
        await receive(stream, 64, self._timeouts.silence)  # until it has read everything


async def fetch(
    network: Streams, donor: PeerId, anchor: Anchor, size: int, timeouts: Timeouts
) -> Floats:
    """The adapter `anchor`, (size,) float32, from one donor.

    Raises NetworkError when the donor cannot deliver, or delivers something else.
    """
    stream = await dial(network, donor, ADAPTER, timeouts.dial)
    try:
        await send_message(stream, round=anchor.round, digest=anchor.digest)
        declared = (await receive_message(stream, timeouts.silence)).get("size")
        if declared != size:
            raise NetworkError(f"{donor} does not hold this adapter (it offers {declared} values)")
        values = np.empty(size, np.float32)
        for piece in chunks(size):
            expected = encoded_size(values[piece].size, "none")
            frame = await receive(stream, expected, timeouts.silence)
            if len(frame) != expected:
                raise NetworkError(f"{donor} sent a chunk of the wrong size")
            values[piece] = decode(frame, "none")
        await send(stream, b"thanks", timeouts.silence)
    finally:
        stream.close()
    if await asyncio.to_thread(digest_of, values) != anchor.digest:
        raise NetworkError(f"{donor} sent an adapter with another digest")
    return values
