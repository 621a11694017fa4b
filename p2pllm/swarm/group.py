"""The group of a round: who averages with whom, with what weight, and who reduces which part."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from p2pllm.config.run import AveragingConfig
from p2pllm.coverage import Span
from p2pllm.swarm.codec import CHUNK, Compression
from p2pllm.swarm.network import PeerId
from p2pllm.swarm.rounds import Anchor

Robust = Literal["none", "clip", "trimmed_mean"]
_SPEED_SLACK = 2.0  # work carried over from a round that was missed counts as well
_SAME_LINE = 2.5  # lines that differ by less than this factor count as equal
_FASTEST_LINE = 4.0  # times the median


@dataclass(frozen=True)
class Member:
    """One trainer's stake in a round, as it declared it when it joined the group."""

    peer: PeerId
    weight: float  # samples behind its delta
    norm: float  # L2 norm of its whole delta
    dialable: bool = True  # one that cannot be dialled reduces nothing
    speed: float = 0.0  # samples per second; 0: not known yet
    uplink: float = 0.0  # bytes per second that the others got from it lately; 0: not known yet
    spans: tuple[Span, ...] = ()  # of the run's rows, which no other member may have trained on

    def __post_init__(self) -> None:
        """Spans that came over the network are lists. Raises TypeError, ValueError."""
        object.__setattr__(self, "spans", tuple(Span(*map(int, span)) for span in self.spans))

    @property
    def is_sane(self) -> bool:
        numbers = (self.weight, self.norm, self.speed, self.uplink)
        return (
            all(type(n) is float and math.isfinite(n) and n >= 0 for n in numbers)
            and 0 < self.weight < 1e9
            and all(s.shard >= 0 and 0 <= s.begin < s.end < 2**53 for s in self.spans)
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
    elapsed: float  # seconds, by the leader's clock, for which anybody can have worked on it
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
        weights, scales = self.weights(), self.scales()
        return {peer: weights[peer] * scales[peer] for peer in self.peers}

    def weights(self) -> dict[PeerId, float]:
        """Each member's share of the weights; together they are 1."""
        counted = {m.peer: min(m.weight, self._most("weight", m)) for m in self.members}
        total = sum(counted.values())
        return {peer: weight / total for peer, weight in counted.items()}

    def scales(self) -> dict[PeerId, float]:
        """By what each member's delta is multiplied so that its norm is within bounds."""
        return {m.peer: min(1.0, self._most("norm", m) / (m.norm or 1.0)) for m in self.members}

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
            for m in self.members:
                if (value := getattr(m, what)) <= self._most(what, m):
                    continue
                if value > (bound := self._bound(what)):
                    how = f"{value / bound * self.clip:.3g} times the median"
                else:
                    how = f"of {value:.0f} samples, more than its speed allows"
                found[m.peer] = f"{what} {how}, cut down"
        return found

    def _most(self, what: Literal["weight", "norm"], member: Member) -> float:
        """What counts of this member at most."""
        bound = self._bound(what)
        if what == "weight" and self.robust != "none" and member.speed and self.elapsed:
            bound = min(bound, _SPEED_SLACK * member.speed * self.elapsed)
        return bound

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
            elapsed=float(fields["elapsed"]),
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
        if self.parts != divide(size, self.members):
            return "its parts are not those that the members' lines make"
        return ""


def divide(size: int, members: Sequence[Member]) -> tuple[int, ...]:
    """How many values each member reduces, so that all lines are busy for the same time.

    Who reduces p of `size` values sends size + (N - 2) * p of them in a round, and receives as
    many. Whose line is too slow even for what everybody sends reduces nothing, and neither does
    one that cannot be dialled. A lone member reduces everything itself in any case.
    """
    reducers = [m for m in members if m.dialable] or list(members[:1])
    unit = CHUNK if size >= 8 * CHUNK * len(reducers) else 1
    ends = itertools.accumulate(_part_sizes(reducers, len(members)))
    edges = [min(round(end * size / unit) * unit, size) for end in ends]
    lengths = iter([b - a for a, b in itertools.pairwise([0, *edges[:-1], size])])
    return tuple(next(lengths) if m in reducers else 0 for m in members)


def _part_sizes(reducers: Sequence[Member], members: int) -> list[float]:
    """The fraction of all values for each reducer."""
    lines = _relative_lines(reducers)
    if members <= 2 or len(set(lines)) == 1:
        return [1 / len(lines)] * len(lines)
    fastest = sorted(lines, reverse=True)
    for taking, slowest in enumerate(fastest, 1):
        # The time, in units of what it takes a usual line to send all values once.
        time = (members - 2 + taking) / sum(fastest[:taking])
        if time * slowest > 1 and (taking == len(fastest) or time * fastest[taking] <= 1):
            break
    return [max(time * line - 1, 0.0) / (members - 2) for line in lines]


def _relative_lines(members: Sequence[Member]) -> list[float]:
    """Each member's line as a multiple of the median. Differences that a measurement on a busy
    machine shows are none, and nobody gets everything by boasting."""
    known = [m.uplink for m in members if m.uplink]
    usual = statistics.median(known) if known else 1.0
    lines = [min((m.uplink or usual) / usual, _FASTEST_LINE) for m in members]
    return [1.0 if 1 / _SAME_LINE <= line <= _SAME_LINE else line for line in lines]
