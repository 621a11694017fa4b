"""The arithmetic of one part: contributions come in chunk by chunk, their average goes out.

Pure: no streams, no clock. Each contribution passes the guards here before the part may count:
exact size, finite, no larger than the norm that its sender declared to the whole group.
"""

import math

import numpy as np

from p2pllm.swarm.codec import Floats, chunks, decode, encode, encoded_size
from p2pllm.swarm.group import Group
from p2pllm.swarm.network import PeerId

NORM_SLACK = 1.02  # rounding on the wire must not make an honest peer a liar
_TRIM_FROM = 4  # members; with fewer, dropping two values leaves too little


class AttemptFailed(Exception):
    """This attempt is over for everybody. culprit: the member to leave out of the next one."""

    def __init__(self, culprit: PeerId, reason: str) -> None:
        self.culprit, self.reason = culprit, reason
        super().__init__(f"{culprit}: {reason}")


class Reducer:
    """One member's part of the adapter, while its average grows."""

    def __init__(
        self, group: Group, me: PeerId, delta: Floats, rounding: Floats | None, average: Floats
    ) -> None:
        """delta, rounding, average: the whole (size,) arrays; rounding is left over from earlier
        rounds; average gets its values of this part here."""
        self._group, self._me = group, me
        part = group.part_of(me)
        self._own = delta[part]
        self._rounding = None if rounding is None else rounding[part]
        self._average = average[part]
        self.pieces = chunks(self._average.size)
        self._shares = group.shares()
        self._trims = group.robust == "trimmed_mean" and len(group.members) >= _TRIM_FROM
        self._kept: list[dict[PeerId, Floats]] = [{} for _ in self.pieces]  # only when trimming
        self._missing = [len(group.members)] * len(self.pieces)
        self._squares = dict.fromkeys(group.peers, 0.0)
        self._unchecked = set(group.peers) if self.pieces else set()

    @property
    def waits_for(self) -> set[PeerId]:
        """Whose contribution has not passed the guards yet."""
        return self._unchecked

    def add_own(self, at: int) -> bytes | None:
        """Like `add`, for this member's own chunk."""
        return self._add(at, self._me, self._own[self.pieces[at]])

    def add(self, at: int, sender: PeerId, frame: memoryview) -> bytes | None:
        """Take one chunk; the average's bytes, once the chunk has come from everybody.

        Raises AttemptFailed when it does not pass the guards.
        """
        size = self._own[self.pieces[at]].size
        chunk = decoded(frame, size, sender, self._group)
        self._squares[sender] += squares(chunk)
        if not math.isfinite(self._squares[sender]):
            raise AttemptFailed(sender, "its delta is not finite")
        return self._add(at, sender, chunk)

    def close(self, sender: PeerId) -> None:
        """Everything of this member has come. Raises AttemptFailed when it is too much."""
        declared = next(m.norm for m in self._group.members if m.peer == sender)
        if math.sqrt(self._squares[sender]) > declared * NORM_SLACK + 1e-6:
            raise AttemptFailed(sender, "its delta is larger than it declared")
        self._unchecked.discard(sender)

    def _add(self, at: int, sender: PeerId, chunk: Floats) -> bytes | None:
        share = np.float32(self._shares[sender])
        if self._trims:
            self._kept[at][sender] = chunk
        elif self._missing[at] == len(self._shares):
            np.multiply(chunk, share, out=self._average[self.pieces[at]])
        else:
            self._average[self.pieces[at]] += chunk * share
        self._missing[at] -= 1
        return self._finish(at) if self._missing[at] == 0 else None

    def _finish(self, at: int) -> bytes:
        values = self._average[self.pieces[at]]
        if self._trims:
            values[:] = self._trimmed_mean(self._kept[at])
            self._kept[at].clear()
        if self._rounding is not None:
            values += self._rounding[self.pieces[at]]
        frame = encode(values, self._group.compression)
        exact = values.copy() if self._rounding is not None else values
        # We too go on from the bytes that the others get, so that all end bit-identical.
        values[:] = decode(frame, self._group.compression)
        if self._rounding is not None:
            self._rounding[self.pieces[at]] = exact - values
        return frame

    def _trimmed_mean(self, contributions: dict[PeerId, Floats]) -> Floats:
        """Weighted, without the largest and the smallest value of each coordinate.

        Yin et al. 2018, "Byzantine-Robust Distributed Learning".
        """
        values = np.stack(list(contributions.values()))
        weights = np.array([self._shares[peer] for peer in contributions], np.float32)[:, None]
        counted = np.broadcast_to(weights, values.shape).copy()
        columns = np.arange(values.shape[1])
        highest, lowest = np.argmax(values, axis=0), np.argmin(values, axis=0)
        lowest = np.where(lowest == highest, (highest + 1) % len(values), lowest)  # all are equal
        counted[highest, columns] = counted[lowest, columns] = 0
        mean: Floats = (values * counted).sum(axis=0) / counted.sum(axis=0)
        return mean


def squares(values: Floats) -> float:
    """The sum of the squares; not finite when a value is not, or is too large for a float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.dot(values, values))


def decoded(frame: bytes | memoryview, size: int, peer: PeerId, group: Group) -> Floats:
    """(size,) float32. Raises AttemptFailed when the frame has another length."""
    if len(frame) != encoded_size(size, group.compression):
        raise AttemptFailed(peer, f"sent a chunk of {len(frame)} bytes")
    return decode(frame, group.compression)
