"""Gathering the group of a round, at the peer whom all the others join.

Trainers come while they still train, and say when they are ready. The group closes in the moment
the last one is, or at a deadline with those who are. The leader gathers whether or not it is ready
itself; it is left out at the deadline like anyone else.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from p2pllm.config.run import AveragingConfig
from p2pllm.coverage import shared_shards
from p2pllm.swarm.group import Group, Member, divide
from p2pllm.swarm.network import (
    NetworkError,
    PeerId,
    Stream,
    Streams,
    Timeouts,
    dial,
    in_background,
    loop_time,
    receive_message,
    send_message,
)
from p2pllm.swarm.rounds import (
    Anchor,
    SwarmView,
    agreed_anchor,
    expected_in,
    leader_of,
    learned_deadline,
    precedes,
)
from p2pllm.swarm.suspicion import Suspicion

JOIN = "p2pllm/join"  # the stream protocol's name
HELLO = "p2pllm/hello"  # answers with the peer's own progress record
_SAME_ROWS = "trained on rows that another member has trained on, too"
_ALONE = 120.0  # seconds for which one that nobody answers any more takes itself to be cut off


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
View = Callable[[float], Awaitable[SwarmView]]  # called with how old, in seconds, it may be


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
    seats: dict[PeerId, Seat] = field(default_factory=dict)
    silent: dict[PeerId, int] = field(default_factory=dict)  # unanswered hellos in a row
    greeted: set[PeerId] = field(default_factory=set)  # whose answer to a hello is awaited
    refused: dict[PeerId, str] = field(default_factory=dict)  # who came and could not be let in
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def keeps_rows_of(self, member: Member) -> bool:
        """Of two that trained on the same rows one takes part, so that no row counts twice: whether
        it is this member. The other is told, and begins again with other rows."""
        rivals = [m for m in self.ready if m.peer != member.peer]
        rivals = [m for m in rivals if shared_shards(m.spans, member.spans)]
        keeps = all(precedes(member.peer, rival.peer) for rival in rivals)
        self.refused.pop(member.peer, None)
        for loser in rivals if keeps else [member]:
            self.refused[loser.peer] = _SAME_ROWS
            self.seats[loser.peer].outcome.set_result(NoGroup(_SAME_ROWS))
        return keeps

    @property
    def ready(self) -> list[Member]:
        return [s.member for s in self._ready_seats if s.member]

    @property
    def waited(self) -> float:
        """Seconds since the first one was ready."""
        return loop_time() - min((s.ready_at for s in self._ready_seats), default=loop_time())

    @property
    def _ready_seats(self) -> list[Seat]:
        return [
            s
            for s in self.seats.values()
            if s.member and not s.outcome.done() and s.peer not in self.blamed
        ]


class Leader:
    """What a peer does for the others when they join it."""

    def __init__(
        self,
        network: Streams,
        rules: AveragingConfig,
        view: View,
        timeouts: Timeouts,
        suspicion: Suspicion,
    ) -> None:
        self._network, self._rules = network, rules
        self._view, self._timeouts = view, timeouts
        self._suspicion = suspicion
        self._anchor: Anchor | None = None
        self._held_since = self._work_since = 0.0
        self._moved = asyncio.Event()  # we hold another adapter than a moment ago
        self._leads = False  # we are a trainer that takes part
        self._size = 0  # values of the adapter
        self._gathering: Gathering | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._waits: list[float] = []
        self._had_company = False

    def stand_at(self, anchor: Anchor, size: int, leads: bool) -> None:
        """This peer holds that adapter, of so many values, and trains on it or not."""
        if anchor != self._anchor:
            self._disband(NoGroup("the round is over", ahead=True))
            # With overlap, work on an anchor begins while the average that makes it is under way.
            began = self._held_since if self._rules.overlap else loop_time()
            self._work_since, self._held_since = began, loop_time()
        self._anchor, self._size, self._leads = anchor, size, leads
        self._moved.set()

    def learn(self, waited: float) -> None:
        """How long, in seconds, a group waited from its first ready member to its closing."""
        self._waits.append(waited)

    def notice(self, view: SwarmView) -> None:
        """Whoever has had company and loses it all may be cut off himself."""
        self._had_company |= bool(view.peers)

    # ---- seats

    def seat(self, anchor: Anchor, peer: PeerId) -> Seat:
        """Somebody has come. Its outcome is known when the group closes."""
        if self._gathering is None or self._gathering.anchor != anchor:
            self._disband(NoGroup("the round is over"))
            self._gathering = Gathering(anchor, self._suspicion.blamed)
            in_background(self._gather(self._gathering), self._tasks)
        seat = Seat(peer, asyncio.get_running_loop().create_future())
        self._gathering.seats[peer] = seat
        self._gathering.silent.pop(peer, None)
        return seat

    def make_ready(self, seat: Seat, member: Member) -> None:
        """It has finished its local epoch, and declares its stake."""
        here = self._gathering
        if here is not None and here.seats.get(seat.peer) is seat:
            seat.member, seat.ready_at = member, loop_time()
            if here.keeps_rows_of(member):
                here.changed.set()

    def unseat(self, seat: Seat) -> None:
        """It has gone, or its outcome is known."""
        here = self._gathering
        if here is not None and here.seats.get(seat.peer) is seat:
            del here.seats[seat.peer]
            here.silent[seat.peer] = 1  # it hung up too early; one hello unanswered, and it is gone

    def _disband(self, outcome: Outcome) -> None:
        here, self._gathering = self._gathering, None
        for seat in here.seats.values() if here is not None else ():
            if not seat.outcome.done():
                seat.outcome.set_result(_for_seat(seat, outcome))

    # ---- the streams of the others

    async def serve(self, stream: Stream) -> None:
        """Handle one trainer's wish to join."""
        message = await receive_message(stream, self._timeouts.silence)
        try:
            anchor = Anchor(**message["anchor"])
        except (KeyError, TypeError) as problem:
            raise NetworkError("a malformed wish to join") from problem
        if refusal := await self._refusal(anchor, stream.peer):
            await send_message(stream, answer="no", reason=refusal.reason, ahead=refusal.ahead)
            return
        seat = self.seat(anchor, stream.peer)
        listening = asyncio.ensure_future(self._listen(stream, seat))
        try:
            while not seat.outcome.done() and not listening.done():
                await send_message(stream, answer="wait")
                await asyncio.wait(
                    (seat.outcome, listening),
                    timeout=self._timeouts.heartbeat,
                    return_when=asyncio.FIRST_COMPLETED,
                )
            if seat.outcome.done():
                await send_message(stream, **_as_answer(seat.outcome.result()))
                await asyncio.wait((listening,), timeout=self._timeouts.dial)  # until it has read
        finally:
            listening.cancel()
            self.unseat(seat)

    async def _listen(self, stream: Stream, seat: Seat) -> None:
        """Until it hangs up, or falls silent: it answers each of our heartbeats."""
        while True:
            try:
                message = await receive_message(stream, self._timeouts.silence)
            except NetworkError:
                return
            if "member" not in message:
                continue
            try:
                member = Member(**message["member"])
                is_sane = member.peer == stream.peer and member.is_sane
            except (TypeError, ValueError):
                is_sane = False
            if not is_sane:
                reason = "the declared weight, norm or rows are not sane numbers"
                self._suspicion.blame(stream.peer, reason)
                if not seat.outcome.done():
                    seat.outcome.set_result(NoGroup(reason))
                return
            self.make_ready(seat, member)

    async def _refusal(self, anchor: Anchor, peer: PeerId) -> NoGroup | None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(4 * self._timeouts.look):
                # We may be just about to commit the round that it starts from.
                while self._anchor is None or self._anchor.round < anchor.round:
                    self._moved.clear()
                    await self._moved.wait()
        if self._anchor == anchor and self._leads:
            blamed = self._suspicion.blamed.get(peer)
            return NoGroup(f"left out of this round: {blamed}") if blamed else None
        here = f"round {self._anchor.round}" if self._anchor else "no round yet"
        ahead = self._anchor is not None and self._anchor.round >= anchor.round
        if self._gathering is not None:
            self._gathering.refused[peer] = f"stale anchor: it came for round {anchor.round}"
        return NoGroup(f"stale anchor: the leader is at {here}, another adapter", ahead)

    # ---- closing

    async def _gather(self, here: Gathering) -> None:
        is_news = False  # somebody has become ready: the records as we know them will do
        while self._gathering is here:
            view = await self._view(2 * self._timeouts.heartbeat if is_news else 0.0)
            if self._gathering is not here:
                return
            if outcome := self._verdict(here, view):
                self._disband(outcome)
                return
            if here.ready:
                self._greet_missing(here, view)
            pause = self._timeouts.look if here.ready else self._timeouts.heartbeat
            try:
                async with asyncio.timeout(pause):
                    await here.changed.wait()
                is_news = True
            except TimeoutError:
                is_news = False
            here.changed.clear()

    def _verdict(self, here: Gathering, view: SwarmView) -> Outcome | None:
        """What becomes of everybody who is here; None: wait."""
        leader = leader_of(here.anchor, view, self._suspicion.not_to_lead, dialable=True)
        if leader != self._network.me and precedes(leader, self._network.me):
            return Redirect(leader)
        agreed = agreed_anchor(here.anchor, view)
        if agreed is not None and agreed.round > here.anchor.round:
            return NoGroup(f"the others already hold round {agreed.round}", ahead=True)
        return self._closing(here, view)

    def _closing(self, here: Gathering, view: SwarmView) -> Group | None:
        """The group, if it is time to close it."""
        ready, missing = here.ready, self._missing(here, view)
        deadline = learned_deadline(self._waits, self._rules.deadline)
        if not ready or len(ready) < self._rules.min_peers:
            return None
        if here.waited < self._patience(here, view):
            return None
        if missing and here.waited < deadline and len(ready) < self._rules.max_group:
            return None
        self._had_company = bool(view.peers)  # who has waited long enough goes on alone
        left_out = self._behind(here, view)
        left_out |= dict.fromkeys(missing, f"not ready after {here.waited:.1f} s") | here.refused
        left_out |= dict.fromkeys(self._gone(here, view), "does not answer")
        ready.sort(key=lambda m: m.peer)
        members = ready[: self._rules.max_group]
        left_out |= {m.peer: "the group was full" for m in ready[len(members) :]}
        return Group(
            id=secrets.token_hex(8),
            anchor=here.anchor,
            members=tuple(members),
            parts=divide(self._size, members),
            compression=self._rules.compression,
            robust=self._rules.robust,
            clip=self._rules.clip,
            waited=here.waited,
            deadline=deadline,
            elapsed=loop_time() - self._work_since,
            left_out=left_out | self._suspicion.blamed,
        )

    def _missing(self, here: Gathering, view: SwarmView) -> set[PeerId]:
        expected = set(expected_in(here.anchor, view))
        expected -= self._gone(here, view) | set(self._suspicion.blamed)
        if self._leads and self._anchor == here.anchor:
            expected |= {self._network.me}
        return expected - {m.peer for m in here.ready}

    def _patience(self, here: Gathering, view: SwarmView) -> float:
        """How long, in seconds, the group does not close with those who are here. When most of the
        others, or all that we knew, fall silent at once, it is rather we who are cut off; what we
        then did alone would be lost when we are back."""
        self.notice(view)
        if not view.peers:
            return _ALONE if self._had_company else 0.0
        ready = {m.peer for m in here.ready}
        alive = {p.peer for p in view.trainers if p.state in ("training", "ready")}
        away = (alive | ({self._network.me} if self._leads else set())) - ready
        return self._timeouts.record_life if len(away) > len(ready) else 0.0

    def _behind(self, here: Gathering, view: SwarmView) -> dict[PeerId, str]:
        """Who takes part in the run, but not from this adapter on."""
        return {
            p.peer: f"holds round {p.round}, not this adapter of round {here.anchor.round}"
            for p in view.trainers
            if p.state in ("training", "ready") and p.peer not in here.seats
            if Anchor(p.round, p.digest) != here.anchor
        }

    def _gone(self, here: Gathering, view: SwarmView) -> set[PeerId]:
        """Who is expected, is not here and has not answered our hello twice."""
        silent = {p for p, strikes in here.silent.items() if strikes > 1}
        return silent & expected_in(here.anchor, view) - set(here.seats)

    def _greet_missing(self, here: Gathering, view: SwarmView) -> None:
        """Find out at once who is dead, rather than when its record expires."""

        async def greet(peer: PeerId) -> None:
            try:
                stream = await dial(self._network, peer, HELLO, self._timeouts.dial / 2)
                await receive_message(stream, self._timeouts.dial / 2)
                stream.close()
                here.silent.pop(peer, None)
                self._suspicion.clear(peer)
            except NetworkError:
                here.silent[peer] = here.silent.get(peer, 0) + 1
                here.changed.set()
            finally:
                here.greeted.discard(peer)

        dialable = {p.peer for p in view.trainers if p.dialable}
        absent = self._missing(here, view) - set(here.seats) - here.greeted - {self._network.me}
        for peer in absent & dialable:
            here.greeted.add(peer)
            in_background(greet(peer), self._tasks)


def _for_seat(seat: Seat, outcome: Outcome) -> Outcome:
    """Who is not in the group learns why."""
    if isinstance(outcome, Group) and seat.peer not in outcome.peers:
        return NoGroup(outcome.left_out.get(seat.peer, "the group closed without us"))
    return outcome


def _as_answer(outcome: Outcome) -> dict[str, Any]:
    match outcome:
        case Group():
            return {"answer": "group", "group": outcome.as_message()}
        case Redirect():
            return {"answer": "redirect", "leader": outcome.leader}
        case NoGroup():
            return {"answer": "no", "reason": outcome.reason, "ahead": outcome.ahead}
