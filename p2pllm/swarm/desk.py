"""Where streams of the all-reduce arrive, and wait for their group when they are early."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from p2pllm.swarm.allreduce import AllReduce, Reduced
from p2pllm.swarm.network import NetworkError, Stream, Timeouts, receive_message


class Desk:
    """One for each peer and run: it hands every stream to the attempt that it belongs to."""

    def __init__(self, timeouts: Timeouts) -> None:
        self._timeouts = timeouts
        self._attempts: dict[str, asyncio.Future[AllReduce]] = {}

    async def serve(self, stream: Stream) -> None:
        message = await receive_message(stream, self._timeouts.silence)
        group = str(message.get("group"))[:64]
        if group not in self._attempts and len(self._attempts) > 64:
            raise NetworkError("too many groups are being waited for")
        try:
            async with asyncio.timeout(self._timeouts.silence):
                attempt = await asyncio.shield(self._expect(group))
        except TimeoutError:
            self._attempts.pop(group, None)
            raise NetworkError(f"{stream.peer} came for a group that we are not in") from None
        await attempt.serve(stream)

    async def run(self, attempt: AllReduce) -> Reduced:
        """Raises AttemptFailed."""
        self._expect(attempt.group.id).set_result(attempt)
        return await attempt.run()

    def forget(self, attempt: AllReduce) -> Coroutine[Any, Any, None]:
        """To be run in the background: the other members may still be reading from us."""

        async def later() -> None:
            await attempt.drain()
            self._attempts.pop(attempt.group.id, None)

        return later()

    def _expect(self, group: str) -> "asyncio.Future[AllReduce]":
        if group not in self._attempts:
            self._attempts[group] = asyncio.get_running_loop().create_future()
        return self._attempts[group]
