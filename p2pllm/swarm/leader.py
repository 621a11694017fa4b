"""Gathering the group of a round, at the peer whom all the others join.

Trainers come while they still train, and say when they are ready. The group closes in the moment
the last one is, or at a deadline with those who are. The leader gathers whether or not it is ready
itself; it is left out at the deadline like anyone else.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from p2pllm.config.run import AveragingConfig
from p2pllm.swarm.gathering import Gathering, NoGroup, Outcome, Redirect, Seat
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
    leader_of,
    learned_deadline,
    precedes,
)
from p2pllm.swarm.suspicion import Suspicion

JOIN = "p2pllm/join"  # the stream protocol's name
HELLO = "p2pllm/hello"  # answers with the peer's own progress record
View = Callable[[float], Awaitable[SwarmView]]  # called with how old, in seconds, it may be


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
        # By the loop's clock, when the group closes without those who are not ready; None: not yet.
        self.closes_at: float | None = None
        self._before: frozenset[PeerId] = frozenset()  # who was in the last group
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

    def learn(self, group: Group) -> None:
        """Who was in a group, and how long it waited for them."""
        self._waits.append(group.waited)
        self._before = frozenset(group.peers)

    def notice(self, view: SwarmView) -> None:
        """Whoever has had company and loses it all may be cut off himself."""
        self._had_company |= bool(view.peers)

    # ---- seats

    def seat(self, anchor: Anchor, peer: PeerId) -> Seat:
        """Somebody has come. Its outcome is known when the group closes."""
        if self._gathering is None or self._gathering.anchor != anchor:
            self._disband(NoGroup("the round is over"))
            # Who has been silent for long needs to leave one hello only unanswered.
            silent = dict.fromkeys(self._suspicion.suspects, 1)
            self._gathering = Gathering(anchor, self._suspicion.blamed, self._before, silent=silent)
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
            if here.admit(member):
                here.changed.set()

    def unseat(self, seat: Seat) -> None:
        """It has gone, or its outcome is known."""
        here = self._gathering
        if here is not None and here.seats.get(seat.peer) is seat:
            del here.seats[seat.peer]
            here.silent[seat.peer] = 1  # it hung up too early; one hello unanswered, and it is gone

    def _disband(self, outcome: Outcome) -> None:
        self.closes_at = None
        here, self._gathering = self._gathering, None
        if here is not None:
            here.tell(outcome)

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
                left = None if self.closes_at is None else self.closes_at - loop_time()
                await send_message(stream, answer="wait", closes_in=left)
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
            async with asyncio.timeout(self._timeouts.silence / 2):
                # We may be about to commit the round that it starts from, over a slower line.
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
        """The group, if it is time to close it. The rules are in `closing.py`."""
        attendance, rules = here.attendance(self._leads), self._rules
        if not attendance.has_quorum(rules):
            return None
        self.notice(view)
        patience = attendance.patience(view, self._had_company, self._timeouts.record_life)
        deadline = learned_deadline(self._waits, rules.deadline)
        if any(precedes(peer, self._network.me) for peer in self._suspicion.suspects):
            # The others may have gone to the one before us later than we did, and still wait there.
            found_out = self._timeouts.silence + 2 * self._timeouts.heartbeat
            deadline = min(max(deadline, found_out), rules.deadline.ceiling)
        self.closes_at = loop_time() + max(deadline, patience) - attendance.waited
        if attendance.waited < patience or not attendance.closes(view, rules, deadline):
            return None
        self._had_company = bool(view.peers)  # who has waited long enough goes on alone
        members = attendance.members(rules.max_group)
        return Group(
            id=secrets.token_hex(8),
            anchor=here.anchor,
            members=tuple(members),
            parts=divide(self._size, members),
            compression=rules.compression,
            robust=rules.robust,
            clip=rules.clip,
            waited=attendance.waited,
            deadline=deadline,
            elapsed=loop_time() - self._work_since,
            left_out=attendance.left_out(view, members),
        )

    def _greet_missing(self, here: Gathering, view: SwarmView) -> None:
        """Find out at once who is dead, rather than when its record expires."""

        async def greet(peer: PeerId) -> None:
            try:
                if await answers(self._network, peer, self._timeouts):
                    here.silent.pop(peer, None)
                    self._suspicion.clear(peer)
                else:
                    here.silent[peer] = here.silent.get(peer, 0) + 1
                    here.changed.set()
            finally:
                here.greeted.discard(peer)

        dialable = {p.peer for p in view.trainers if p.dialable}
        absent = here.attendance(self._leads).missing(view) - set(here.seats) - {self._network.me}
        for peer in (absent & dialable) - here.greeted:
            here.greeted.add(peer)
            in_background(greet(peer), self._tasks)


async def answers(network: Streams, peer: PeerId, timeouts: Timeouts) -> bool:
    """Whether it is there, and answers a hello."""
    try:
        stream = await dial(network, peer, HELLO, timeouts.dial / 2)
        with contextlib.closing(stream):
            await receive_message(stream, timeouts.dial / 2)
    except NetworkError:
        return False
    return True


def _as_answer(outcome: Outcome) -> dict[str, Any]:
    match outcome:
        case Group():
            return {"answer": "group", "group": outcome.as_message()}
        case Redirect():
            return {"answer": "redirect", "leader": outcome.leader}
        case NoGroup():
            return {"answer": "no", "reason": outcome.reason, "ahead": outcome.ahead}
