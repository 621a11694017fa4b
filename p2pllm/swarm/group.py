"""The group of a round: who averages with whom, with what weight, and who reduces which part."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from p2pllm.config.run import AveragingConfig
from p2pllm.swarm.codec import CHUNK, Compression
from p2pllm.swarm.network import PeerId
from p2pllm.swarm.rounds import Anchor

Robust = Literal["none", "clip", "trimmed_mean"]


@dataclass(frozen=True)
class Member:
    """One trainer's stake in a round, as it declared it when it joined the group."""

    peer: PeerId
    weight: float  # samples behind its delta
    norm: float  # L2 norm of its whole delta
    dialable: bool = True  # one that cannot be dialled reduces nothing

    @property
    def is_sane(self) -> bool:
        numbers = (self.weight, self.norm)
        return all(type(n) is float and math.isfinite(n) for n in numbers) and (
            0 < self.weight < 1e9 and self.norm >= 0
        )


@dataclass(frozen=True)
class Group:
    """What every member of one attempt at a round must see alike. The leader makes it."""

    id: str
    anchor: Anchor
    members: tuple[Member, ...]
    parts: tuple[int, ...]  # values that each member reduces, in the members' order; sum = size
    compression: Compression
    robust: Robust
    clip: float
    waited: float  # seconds from the first ready member to the closing of the group
    deadline: float  # seconds after which it would have closed in any case
    left_out: dict[PeerId, str]  # who was expected and is not in, and why

    @property
    def peers(self) -> tuple[PeerId, ...]:
        return tuple(m.peer for m in self.members)

    def part_of(self, peer: PeerId) -> slice:
        """The values, as a slice of the flat adapter, that this member reduces."""
        at = self.peers.index(peer)
        start = sum(self.parts[:at])
        return slice(start, start + self.parts[at])

    def shares(self) -> dict[PeerId, float]:
        """By what each member's delta is multiplied before the sum: its share of the weights, times
        the scale that brings its norm within bounds.

        Every reducer computes this alike from the declared numbers, so a member's contribution is
        scaled by one number over the whole adapter.
        """
        most, longest = self._bound("weight"), self._bound("norm")
        weights = {m.peer: min(m.weight, most) for m in self.members}
        total = sum(weights.values())
        return {
            m.peer: weights[m.peer] / total * (min(1.0, longest / m.norm) if m.norm > 0 else 1.0)
            for m in self.members
        }

    def longest_average(self, reducer: PeerId) -> float:
        """The largest norm that an honest average of a part can have, rounding left aside.

        reducer: what it still owes from earlier rounds (int8) is part of the norm it declared.
        """
        if self.robust == "trimmed_mean":
            return math.sqrt(sum(m.norm**2 for m in self.members))
        shares = self.shares()
        owed = sum(m.norm for m in self.members if m.peer == reducer and self.compression == "int8")
        return sum(shares[m.peer] * m.norm for m in self.members) + owed

    def out_of_proportion(self) -> dict[PeerId, str]:
        """The members whose norm or weight is cut down, and by how much it was too large."""
        found: dict[PeerId, str] = {}
        for what in ("weight", "norm"):
            bound = self._bound(what)
            for m in self.members:
                if (value := getattr(m, what)) > bound:
                    times = value / bound * self.clip
                    found[m.peer] = f"{what} {times:.3g} times the median, cut down"
        return found

    def _bound(self, what: Literal["weight", "norm"]) -> float:
        if self.robust == "none":
            return math.inf
        values: list[float] = [getattr(m, what) for m in self.members]
        return self.clip * statistics.median_low(values)

    def as_message(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_message(cls, fields: dict[str, Any]) -> "Group":
        """Raises ValueError, TypeError or KeyError on anything that is not a group."""
        group = cls(
            id=str(fields["id"]),
            anchor=Anchor(int(fields["anchor"]["round"]), str(fields["anchor"]["digest"])),
            members=tuple(Member(**m) for m in fields["members"]),
            parts=tuple(int(n) for n in fields["parts"]),
            compression=fields["compression"],
            robust=fields["robust"],
            clip=fields["clip"],
            waited=float(fields["waited"]),
            deadline=float(fields["deadline"]),
            left_out=dict(fields["left_out"]),
        )
        if len(group.members) != len(group.parts) or len(set(group.peers)) != len(group.peers):
            raise ValueError("members and parts do not match")
        if not all(m.is_sane for m in group.members) or any(n < 0 for n in group.parts):
            raise ValueError("a member's weight, norm or part is not a sane number")
        return group

    def problem_for(self, mine: Member, size: int, rules: AveragingConfig) -> str:
        """Why this member must not take part in the group; empty when all is as the run agreed."""
        if mine not in self.members:
            return "our own entry was changed"
        if sum(self.parts) != size:
            return f"its parts add up to {sum(self.parts)} values and not to {size}"
        agreed = (rules.compression, rules.robust, rules.clip)
        if (self.compression, self.robust, self.clip) != agreed:
            return "it does not follow the run's averaging rules"
        if any(n and not m.dialable for m, n in zip(self.members, self.parts, strict=True)):
            return "a part went to a member that cannot be dialled"
        return ""


def divide(size: int, members: Sequence[Member]) -> tuple[int, ...]:
    """Equal parts for all members that can be dialled, in whole chunks where that is fair.

    A lone member reduces everything itself, whether it can be dialled or not.
    """
    reducers = [m for m in members if m.dialable] or list(members[:1])
    unit = CHUNK if size >= 8 * CHUNK * len(reducers) else 1
    bounds = np.linspace(0, size, len(reducers) + 1)
    edges = [round(b / unit) * unit for b in bounds[:-1]] + [size]
    lengths = iter([b - a for a, b in itertools.pairwise(edges)])
    return tuple(next(lengths) if m in reducers else 0 for m in members)
