"""Forming the group of a round: the trainers gather at one of them, the leader.

Everybody computes the leader from the same records (`rounds.leader_of`) and goes to it over a
stream while its local epoch is still on; when it is ready, it only has to say so. A leader that
falls silent is suspected, and the next in order takes over. What a leader does is in `leader.py`.
"""

import asyncio
import contextlib
import math
from dataclasses import asdict, dataclass

from p2pllm.config.run import AveragingConfig
from p2pllm.swarm.gathering import NoGroup, Outcome, Redirect
from p2pllm.swarm.group import Group, Member
from p2pllm.swarm.leader import JOIN, Leader, View, answers
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
from p2pllm.swarm.rounds import Anchor, expected_in, leader_of
from p2pllm.swarm.suspicion import Suspicion


@dataclass(frozen=True)
class _Way:
    """On the way to one round's group."""

    anchor: Anchor
    ready: "asyncio.Future[Member]"
    task: "asyncio.Task[Outcome]"


class Lobby:
    """One peer's part in forming groups: as a member, and as a leader for others."""

    def __init__(
        self, network: Streams, rules: AveragingConfig, view: View, timeouts: Timeouts
    ) -> None:
        self.suspicion = Suspicion()
        self.leader = Leader(network, rules, view, timeouts, self.suspicion)
        self._network, self._rules = network, rules
        self._view, self._timeouts = view, timeouts
        self._anchor: Anchor | None = None
        self._size = 0  # values that this round averages
        self._way: _Way | None = None
        self._told: float | None = None  # by the leader, when the group closes
        self._known_until = 0  # the last round for which the others know that we are there

    def stand_at(self, anchor: Anchor, size: int, leads: bool) -> None:
        """Tell the lobby which adapter this peer holds, and whether it trains on it."""
        if anchor != self._anchor:
            self.suspicion.forgive()
            self.turn_back()
        self._anchor, self._size = anchor, size
        self.leader.stand_at(anchor, size, leads)

    @property
    def closes_at(self) -> float | None:
        """By the loop's clock, when the group closes without those who are not ready; None: not
        yet."""
        if (way := self._way) is not None and way.task.done():
            return -math.inf  # the others have done without us
        return self.leader.closes_at if self._told is None else self._told

    async def hear(self, peer: PeerId) -> None:
        """A stream to it broke, which may have been the line: who still answers may take part once
        more."""
        anchor = self._anchor
        if await answers(self._network, peer, self._timeouts) and anchor == self._anchor:
            self.suspicion.excuse(peer)

    def approach(self, anchor: Anchor, dialable: bool) -> _Way:
        """Go to the leader of this round, to be there when the local epoch ends."""
        self.turn_back()
        ready: asyncio.Future[Member] = asyncio.get_running_loop().create_future()
        task = asyncio.ensure_future(self._go(anchor, ready, dialable))
        self._way = _Way(anchor, ready, task)
        return self._way

    def turn_back(self) -> None:
        self._told = None
        if self._way is not None:
            self._way.task.cancel()
            self._way = None

    async def join(self, anchor: Anchor, mine: Member) -> Group | NoGroup:
        """Be part of this round's group. Returns within the deadline's ceiling or so."""
        way = self._way
        if way is None or way.anchor != anchor or way.task.done():
            way = self.approach(anchor, mine.dialable)
        way.ready.set_result(mine)
        try:
            async with asyncio.timeout(self._rules.deadline.ceiling + self._timeouts.silence):
                outcome = await way.task
        except TimeoutError:
            return await self._nobody_closed(anchor, mine)
        finally:
            self._way = None
        assert not isinstance(outcome, Redirect)
        if isinstance(outcome, Group):
            self._known_until = anchor.round + 1
            self.leader.learn(outcome)
        return outcome

    async def _nobody_closed(self, anchor: Anchor, mine: Member) -> NoGroup:
        """The longest wait is over. A leader that had a quorum has no excuse."""
        view = await self._view(0.0)
        ready = [
            p for p in view.trainers if p.state == "ready" and p.peer in expected_in(anchor, view)
        ]
        if len(ready) + 1 < self._rules.min_peers:
            return NoGroup(f"fewer than {self._rules.min_peers} trainers are ready")
        leader = leader_of(anchor, view, self.suspicion.not_to_lead, mine.dialable)
        if leader != self._network.me:
            self.suspicion.blame(leader, "led the group and never closed it")
        else:  # nobody came to us: two that blame each other would wait for each other for ever
            self.suspicion.forgive()
        return NoGroup(f"{view.name(leader)} leads the group and never closed it")

    async def _go(
        self, anchor: Anchor, ready: "asyncio.Future[Member]", dialable: bool
    ) -> Group | NoGroup:
        """Until there is an outcome for this peer; without one, before it is ready, once more."""
        # Who has caught up may lead in its own eyes only: it goes where the others are, and is sent
        # back as soon as they know of it. In round 0 all begin alike.
        leads = dialable and anchor.round <= self._known_until
        while True:
            view = await self._view(2 * self._timeouts.heartbeat)
            self.leader.notice(view)
            leader = leader_of(anchor, view, self.suspicion.not_to_lead, leads)
            leads = dialable
            outcome = await (
                self._stay(anchor, ready)
                if leader == self._network.me
                else self._ask(leader, anchor, ready)
            )
            match outcome:
                case Group():
                    if problem := outcome.problem_for(ready.result(), self._size, self._rules):
                        self.suspicion.blame(
                            leader, f"proposed a group that is not ours: {problem}"
                        )
                        return NoGroup(f"{view.name(leader)} {self.suspicion.blamed[leader]}")
                    return outcome
                case NoGroup() if ready.done() or outcome.ahead:
                    return outcome
                case Redirect(leader=other) if other != leader:
                    self.suspicion.clear(other)  # somebody else can speak with it
            await asyncio.sleep(self._timeouts.look)  # then the records have caught up
            await self._view(0.0)

    async def _stay(self, anchor: Anchor, ready: "asyncio.Future[Member]") -> Outcome:
        """We lead ourselves."""
        seat = self.leader.seat(anchor, self._network.me)
        try:
            await asyncio.wait((ready, seat.outcome), return_when=asyncio.FIRST_COMPLETED)
            if not seat.outcome.done():
                self.leader.make_ready(seat, ready.result())
            return await seat.outcome
        finally:
            self.leader.unseat(seat)

    async def _ask(
        self, leader: PeerId, anchor: Anchor, ready: "asyncio.Future[Member]"
    ) -> Outcome:
        try:
            stream = await dial(self._network, leader, JOIN, self._timeouts.dial)
        except NetworkError:
            self.suspicion.suspect(leader)
            return Redirect(leader)
        telling = asyncio.ensure_future(self._tell(stream, anchor, ready))
        try:
            return await self._await_answer(stream)
        except NetworkError:
            self.suspicion.suspect(leader)
            return Redirect(leader)
        except (ValueError, TypeError, KeyError) as problem:
            self.suspicion.blame(leader, f"proposed something that is not a group: {problem}")
            return Redirect(leader)
        finally:
            telling.cancel()
            stream.close()

    async def _tell(self, stream: Stream, anchor: Anchor, ready: "asyncio.Future[Member]") -> None:
        with contextlib.suppress(NetworkError):  # who listens for the answer notices it, too
            await send_message(stream, anchor=asdict(anchor))
            await send_message(stream, member=asdict(await asyncio.shield(ready)))

    async def _await_answer(self, stream: Stream) -> Outcome:
        """Raises NetworkError, and ValueError, TypeError or KeyError on what is not a group."""
        while True:
            message = await receive_message(stream, self._timeouts.silence)
            match message.get("answer"):
                case "wait":
                    left = message.get("closes_in")
                    self._told = None if left is None else loop_time() + float(left)
                    await send_message(stream, here=True)
                case "redirect":
                    return Redirect(str(message.get("leader")))
                case "no":
                    return NoGroup(str(message.get("reason"))[:200], bool(message.get("ahead")))
                case "group":
                    return Group.from_message(message["group"])
                case _:
                    raise NetworkError("an unknown answer")
