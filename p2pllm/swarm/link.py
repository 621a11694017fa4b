"""The lines by which simulated peers are connected: what a frame's way costs in time."""

import random
from dataclasses import dataclass

from p2pllm.swarm.network import loop_time

_PACKET = 1400  # bytes that are lost together


@dataclass(frozen=True)
class Link:
    """A peer's access line: all of its streams share it, up and down each for itself."""

    latency: float = 0.0  # seconds, one way, to the middle of the network; a round trip has four
    bandwidth: float | None = None  # bytes per second, each way; None: as much as you like
    loss: float = 0.0  # probability that a packet is lost and has to be sent again


INSTANT = Link()


class Line:
    """One direction of a link: frames pass it one after the other."""

    def __init__(self) -> None:
        self._free = 0.0  # when the last bit of what is queued so far has gone in

    def take(self, size: int, link: Link) -> tuple[float, float]:
        """The times at which the first and the last bit of a frame go in."""
        first = max(loop_time(), self._free)
        self._free = first + (size / link.bandwidth if link.bandwidth else 0.0)
        return first, self._free


def retransmission(size: int, one: Link, two: Link, chance: random.Random) -> float:
    """Seconds by which lost packets hold a frame, and all behind it, up on the way.

    A round trip, however many of its packets are lost, and one more for each time that the packet
    is lost again. Nothing slows the sender down, as TCP's congestion control would.
    """
    arrives = (1 - one.loss) * (1 - two.loss)
    late, risk = 0.0, 1 - arrives ** -(-size // _PACKET)
    while risk and chance.random() < risk:
        late, risk = late + 2 * (one.latency + two.latency), 1 - arrives
    return late
