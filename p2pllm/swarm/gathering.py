"""Who has come to the leader of a round so far, and what becomes of them."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from p2pllm.swarm.closing import Attendance, losers_of
from p2pllm.swarm.group import Group, Member
from p2pllm.swarm.network import PeerId, loop_time
from p2pllm.swarm.rounds import Anchor

_SAME_ROWS = "trained on rows that another member has trained on, too"


@dataclass(frozen=True)
class NoGroup:
    """This peer is in no group, and why. `ahead`: the others already hold a later adapter."""

    reason: str
    ahead: bool = False


@dataclass(frozen=True)
class Redirect:
    """Somebody else leads."""

    leader: PeerId


Outcome = Group | NoGroup | Redirect


@dataclass
class Seat:
    """One trainer that has come. Until it is ready, it has no stake to declare."""

    peer: PeerId
    outcome: "asyncio.Future[Outcome]"
    member: Member | None = None
    ready_at: float = 0.0  # by the loop's clock


@dataclass
class Gathering:
    """Who has come for one round so far."""

    anchor: Anchor
    blamed: Mapping[PeerId, str]  # who spoiled this round, and has lost its seat
    before: frozenset[PeerId] = frozenset()  # who was in the group before this one
    seats: dict[PeerId, Seat] = field(default_factory=dict)
    silent: dict[PeerId, int] = field(default_factory=dict)  # unanswered hellos in a row
    greeted: set[PeerId] = field(default_factory=set)  # whose answer to a hello is awaited
    refused: dict[PeerId, str] = field(default_factory=dict)  # who came and could not be let in
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def admit(self, member: Member) -> bool:
        """Whether it may stay. Who has to go is told, and begins again with other rows."""
        losers = losers_of(member, self.ready)
        self.refused.pop(member.peer, None)
        for loser in losers:
            self.refused[loser.peer] = _SAME_ROWS
            self.seats[loser.peer].outcome.set_result(NoGroup(_SAME_ROWS))
        return member not in losers

    def tell(self, outcome: Outcome) -> None:
        """This is what became of it. Who is not in the group learns why."""
        for seat in self.seats.values():
            if not seat.outcome.done():
                seat.outcome.set_result(_for_seat(seat, outcome))

    @property
    def ready(self) -> list[Member]:
        return [s.member for s in self._ready_seats if s.member]

    def attendance(self, leader_trains: bool) -> Attendance:
        """As it stands now."""
        now = loop_time()
        return Attendance(
            self.anchor,
            tuple(self.ready),
            frozenset(self.seats),
            waited=now - min((s.ready_at for s in self._ready_seats), default=now),
            leader_trains=leader_trains,
            blamed=self.blamed,
            refused=self.refused,
            silent=self.silent,
            before=self.before,
        )

    @property
    def _ready_seats(self) -> list[Seat]:
        return [
            s
            for s in self.seats.values()
            if s.member and not s.outcome.done() and s.peer not in self.blamed
        ]


def _for_seat(seat: Seat, outcome: Outcome) -> Outcome:
    if isinstance(outcome, Group) and seat.peer not in outcome.peers:
        return NoGroup(outcome.left_out.get(seat.peer, "the group closed without us"))
    return outcome
