"""Forming the group of a round: the ready trainers gather at one of them, the leader.

Everybody computes the leader from the same records (`rounds.leader_of`) and joins it over a stream,
so the group closes in the moment the last one is ready, not at the next tick of a clock. The leader
gathers whether or not it is ready itself; the others leave it out at the deadline like anyone else.
A leader that falls silent is suspected, and the next in order takes over.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from p2pllm.config.run import AveragingConfig
from p2pllm.swarm.group import Group, Member, divide
from p2pllm.swarm.network import (
    NetworkError,
    PeerId,
    Stream,
    Streams,
    Timeouts,
    dial,
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

JOIN = "p2pllm/join"  # the stream protocol's name
HELLO = "p2pllm/hello"  # answers with the peer's own progress record
_LOOK = 0.5  # seconds between two looks at the records while a group gathers
_ALONE = 120.0  # seconds for which one that nobody answers any more takes itself to be cut off
_SUSPICION = 30.0  # seconds for which a peer that did not answer is not asked to lead


@dataclass(frozen=True)
class NoGroup:
    """This peer is in no group, and why. `ahead`: the others already hold a later adapter."""

    reason: str
    ahead: bool = False


@dataclass(frozen=True)
class _Redirect:
    leader: PeerId


_Outcome = Group | NoGroup | _Redirect


@dataclass
class _Gathering:
    """The members of one round that have come to us so far."""

    anchor: Anchor
    opened: float
    seats: dict[PeerId, tuple[Member, "asyncio.Future[_Outcome]"]] = field(default_factory=dict)
    silent: dict[PeerId, int] = field(default_factory=dict)  # unanswered hellos in a row
    refused: dict[PeerId, str] = field(default_factory=dict)  # who came and could not be let in
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    last: float = 0.0  # when the last member came


class Lobby:
    """One peer's part in forming groups: as a member, and as a leader for others."""

    def __init__(
        self,
        network: Streams,
        rules: AveragingConfig,
        view: Callable[[], Awaitable[SwarmView]],
        timeouts: Timeouts,
    ) -> None:
        self._network, self._rules = network, rules
        self._view, self._timeouts = view, timeouts
        self._anchor: Anchor | None = None
        self._leads = False  # we are a trainer that takes part
        self._size = 0  # values of the adapter
        self._gathering: _Gathering | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._suspects: dict[PeerId, float] = {}
        self._blamed: dict[PeerId, str] = {}  # left out of this round's further attempts
        self._waits: list[float] = []
        self._had_company = False

    def stand_at(self, anchor: Anchor, size: int, leads: bool) -> None:
        """Tell the lobby which adapter this peer holds, and whether it trains on it."""
        if anchor != self._anchor:
            self._blamed.clear()
            self._disband(NoGroup("the round is over", ahead=True))
        self._anchor, self._size, self._leads = anchor, size, leads

    def blame(self, peer: PeerId, reason: str) -> None:
        """Leave a peer out of the next attempts at this round."""
        self._blamed[peer] = reason

    # ---- as a member

    async def join(self, anchor: Anchor, mine: Member) -> Group | NoGroup:
        """Be part of this round's group. Returns within the deadline's ceiling or so."""
        try:
            async with asyncio.timeout(self._rules.deadline.ceiling + self._timeouts.silence):
                return await self._join(anchor, mine)
        except TimeoutError:
            return await self._nobody_closed(anchor, mine)

    async def _nobody_closed(self, anchor: Anchor, mine: Member) -> NoGroup:
        """The longest wait is over. A leader that had a quorum has no excuse."""
        view = await self._view()
        ready = [
            p for p in view.trainers if p.state == "ready" and p.peer in expected_in(anchor, view)
        ]
        if len(ready) + 1 < self._rules.min_peers:
            return NoGroup(f"fewer than {self._rules.min_peers} trainers are ready")
        leader = leader_of(anchor, view, self._suspected(), mine.dialable)
        if leader != self._network.me:
            self.blame(leader, "led the group and never closed it")
        return NoGroup(f"{view.name(leader)} leads the group and never closed it")

    async def _join(self, anchor: Anchor, mine: Member) -> Group | NoGroup:
        while True:
            view = await self._view()
            self._had_company |= bool(view.peers)
            leader = leader_of(anchor, view, self._suspected(), mine.dialable)
            outcome = await (
                self._seat(anchor, mine)
                if leader == self._network.me
                else self._ask(leader, anchor, mine)
            )
            match outcome:
                case Group() if problem := outcome.problem_for(mine, self._size, self._rules):
                    self.blame(leader, f"proposed a group that is not ours: {problem}")
                    return NoGroup(f"{view.name(leader)} {self._blamed[leader]}")
                case Group() | NoGroup():
                    return outcome
                case _Redirect(leader=other) if other != leader:
                    self._suspects.pop(other, None)  # somebody else can speak with it
            await asyncio.sleep(_LOOK)  # redirected: look again, the records are catching up

    async def _ask(self, leader: PeerId, anchor: Anchor, mine: Member) -> _Outcome:
        try:
            stream = await dial(self._network, leader, JOIN, self._timeouts.dial)
        except NetworkError:
            self._suspect(leader)
            return _Redirect(leader)
        try:
            await send_message(stream, anchor=asdict(anchor), member=asdict(mine))
            while True:
                message = await receive_message(stream, self._timeouts.silence)
                match message.get("answer"):
                    case "wait":
                        continue
                    case "redirect":
                        return _Redirect(str(message.get("leader")))
                    case "no":
                        return NoGroup(str(message.get("reason"))[:200], bool(message.get("ahead")))
                    case "group":
                        return Group.from_message(message["group"])
                raise NetworkError("an unknown answer")
        except NetworkError:
            self._suspect(leader)
            return _Redirect(leader)
        except (ValueError, TypeError, KeyError) as problem:
            self.blame(leader, f"proposed something that is not a group: {problem}")
            return _Redirect(leader)
        finally:
            stream.close()

    # ---- as a leader

    async def serve(self, stream: Stream) -> None:
        """Handle one member's wish to join."""
        message = await receive_message(stream, self._timeouts.silence)
        try:
            anchor = Anchor(**message["anchor"])
            member = Member(**message["member"])
        except (KeyError, TypeError) as problem:
            raise NetworkError("a malformed wish to join") from problem
        if refusal := await self._refusal(anchor, member, stream.peer):
            await send_message(stream, answer="no", reason=refusal.reason, ahead=refusal.ahead)
            return
        outcome = self._seat(anchor, member)
        watch = asyncio.ensure_future(stream.receive(64))  # ends when the member hangs up
        try:
            while not outcome.done() and not watch.done():
                await asyncio.wait(
                    (outcome, watch),
                    timeout=self._timeouts.heartbeat,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if not outcome.done():
                    await send_message(stream, answer="wait")
            if outcome.done():
                await send_message(stream, **_as_answer(outcome.result()))
                await asyncio.wait((watch,), timeout=self._timeouts.dial)  # until it has read that
        finally:
            watch.cancel()
            self._unseat(anchor, member.peer, outcome)

    async def _refusal(self, anchor: Anchor, member: Member, peer: PeerId) -> NoGroup | None:
        if member.peer != peer or not member.is_sane:
            self.blame(peer, "the declared weight or norm is not a sane number")
            return NoGroup(self._blamed[peer])
        for _ in range(4):  # we may be just about to commit the round that it starts from
            if self._anchor is not None and self._anchor.round >= anchor.round:
                break
            await asyncio.sleep(_LOOK)
        if self._anchor == anchor and self._leads:
            blamed = self._blamed.get(peer)
            return NoGroup(f"left out of this round: {blamed}") if blamed else None
        here = f"round {self._anchor.round}" if self._anchor else "no round yet"
        ahead = self._anchor is not None and self._anchor.round >= anchor.round
        if self._gathering is not None:
            self._gathering.refused[peer] = f"stale anchor: it came for round {anchor.round}"
        return NoGroup(f"stale anchor: the leader is at {here}, another adapter", ahead)

    def _seat(self, anchor: Anchor, member: Member) -> "asyncio.Future[_Outcome]":
        outcome: asyncio.Future[_Outcome] = asyncio.get_running_loop().create_future()
        if self._gathering is None or self._gathering.anchor != anchor:
            self._disband(NoGroup("the round is over"))
            self._gathering = _Gathering(anchor, opened=loop_time())
            task = asyncio.ensure_future(self._gather(self._gathering))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self._gathering.seats[member.peer] = (member, outcome)
        self._gathering.last = loop_time()
        self._gathering.changed.set()
        return outcome

    def _unseat(self, anchor: Anchor, peer: PeerId, outcome: "asyncio.Future[_Outcome]") -> None:
        gathering = self._gathering
        if (
            gathering
            and gathering.anchor == anchor
            and gathering.seats.get(peer, (0, 0))[1] is outcome
        ):
            del gathering.seats[peer]

    def _disband(self, outcome: _Outcome) -> None:
        if self._gathering is not None:
            for _, seat in self._gathering.seats.values():
                if not seat.done():
                    seat.set_result(outcome)
            self._gathering = None

    async def _gather(self, here: _Gathering) -> None:
        while self._gathering is here:
            here.changed.clear()
            view = await self._view()
            if self._gathering is not here:
                return
            leader = leader_of(here.anchor, view, self._suspected(), dialable=True)
            if leader != self._network.me and precedes(leader, self._network.me):
                self._disband(_Redirect(leader))
                return
            agreed = agreed_anchor(here.anchor, view)
            if agreed is not None and agreed.round > here.anchor.round:
                self._disband(NoGroup(f"the others already hold round {agreed.round}", ahead=True))
                return
            if outcome := self._closing(here, view):
                self._disband(outcome)
                return
            await self._greet_missing(here, view)
            try:
                async with asyncio.timeout(_LOOK):
                    await here.changed.wait()
            except TimeoutError:
                pass

    def _closing(self, here: _Gathering, view: SwarmView) -> Group | None:
        """The group, if it is time to close it."""
        here.seats = {p: seat for p, seat in here.seats.items() if not seat[1].done()}
        missing = self._missing(here, view)
        waited = loop_time() - here.opened
        deadline = learned_deadline(self._waits, self._rules.deadline)
        if len(here.seats) < self._rules.min_peers:
            return None
        if waited < self._patience(here, view):
            return None
        if missing and waited < deadline and len(here.seats) < self._rules.max_group:
            return None
        self._had_company = bool(view.peers)  # who has waited long enough goes on alone
        self._waits.append(here.last - here.opened if not missing else waited)
        left_out = self._behind(here, view)
        left_out |= dict.fromkeys(missing, f"not ready after {waited:.1f} s") | here.refused
        left_out |= dict.fromkeys(self._gone(here, view), "does not answer")
        members = sorted((m for m, _ in here.seats.values()), key=lambda m: m.peer)
        members = members[: self._rules.max_group]
        return Group(
            id=secrets.token_hex(8),
            anchor=here.anchor,
            members=tuple(members),
            parts=divide(self._size, members),
            compression=self._rules.compression,
            robust=self._rules.robust,
            clip=self._rules.clip,
            waited=waited,
            deadline=deadline,
            left_out=left_out | self._blamed,
        )

    def _missing(self, here: _Gathering, view: SwarmView) -> set[PeerId]:
        expected = expected_in(here.anchor, view) - self._gone(here, view) - set(self._blamed)
        if self._leads and self._anchor == here.anchor:
            expected |= {self._network.me}
        return set(expected) - set(here.seats)

    def _patience(self, here: _Gathering, view: SwarmView) -> float:
        """How long, in seconds, the group does not close with those who are here. When most of the
        others, or all that we knew, fall silent at once, it is rather we who are cut off; what we
        then did alone would be lost when we are back."""
        if not view.peers:
            return _ALONE if self._had_company else 0.0
        alive = {p.peer for p in view.trainers if p.state in ("training", "ready")}
        away = (alive | ({self._network.me} if self._leads else set())) - set(here.seats)
        return self._timeouts.record_life if len(away) > len(here.seats) else 0.0

    def _behind(self, here: _Gathering, view: SwarmView) -> dict[PeerId, str]:
        """Who takes part in the run, but not from this adapter on."""
        return {
            p.peer: f"holds round {p.round}, not this adapter of round {here.anchor.round}"
            for p in view.trainers
            if p.state in ("training", "ready") and p.peer not in here.seats
            if Anchor(p.round, p.digest) != here.anchor
        }

    def _gone(self, here: _Gathering, view: SwarmView) -> set[PeerId]:
        """Who is expected and has not answered our hello twice."""
        silent = {p for p, strikes in here.silent.items() if strikes > 1}
        return silent & expected_in(here.anchor, view) - set(here.seats)

    async def _greet_missing(self, here: _Gathering, view: SwarmView) -> None:
        """Find out at once who is dead, rather than when its record expires."""

        async def greet(peer: PeerId) -> None:
            try:
                stream = await dial(self._network, peer, HELLO, self._timeouts.dial / 2)
                await receive_message(stream, self._timeouts.dial / 2)
                stream.close()
                here.silent.pop(peer, None)
                self._suspects.pop(peer, None)
            except NetworkError:
                here.silent[peer] = here.silent.get(peer, 0) + 1

        dialable = {p.peer for p in view.trainers if p.dialable}
        missing = (self._missing(here, view) & dialable) - {self._network.me}
        async with asyncio.TaskGroup() as tasks:
            for peer in missing:
                tasks.create_task(greet(peer))

    # ---- suspicion

    def _suspect(self, peer: PeerId) -> None:
        self._suspects[peer] = loop_time() + _SUSPICION

    def _suspected(self) -> set[PeerId]:
        """Who is not asked to lead, just now or in this round."""
        now = loop_time()
        return {peer for peer, until in self._suspects.items() if until > now} | set(self._blamed)


def _as_answer(outcome: _Outcome) -> dict[str, Any]:
    match outcome:
        case Group():
            return {"answer": "group", "group": outcome.as_message()}
        case _Redirect():
            return {"answer": "redirect", "leader": outcome.leader}
        case NoGroup():
            return {"answer": "no", "reason": outcome.reason, "ahead": outcome.ahead}
