"""Peers that speak the protocol and lie: whatever they say, the honest ones end with the same
adapter, name the liar, and lose no more than a moment.

A liar here is an honest node with one part replaced, so everything else that it says is right.
"""

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import msgpack
import numpy as np
import pytest

from p2pllm.config.run import AveragingConfig, Deadline
from p2pllm.digest import digest_of
from p2pllm.swarm.allreduce import REDUCE, AllReduce
from p2pllm.swarm.daemon import DaemonStream
from p2pllm.swarm.group import Group, Member
from p2pllm.swarm.identity import Identity
from p2pllm.swarm.leader import JOIN
from p2pllm.swarm.network import NetworkError, loop_time, receive_message, send_message
from p2pllm.swarm.node import Averaged, Missed, Node
from p2pllm.swarm.records import Progress, progress_key, seal
from p2pllm.swarm.rounds import Anchor, Average, CatchUp, Standing, next_action, precedes
from p2pllm.swarm.transfer import ADAPTER
from tests.test_node import QUICK, Peers

HONEST = ("ann", "bob", "cat")
RULES = AveragingConfig(deadline=Deadline(floor=0.4, ceiling=0.4))
# Nobody may wait for a deadline here: who is refused is out at once.
PATIENT = AveragingConfig(deadline=Deadline(floor=60.0, ceiling=60.0))


@dataclasses.dataclass
class Told:
    """What the honest peers know in the end."""

    digests: set[str]
    reasons: list[str]  # in which the liar was named
    averages: list[Averaged]


class Lied(Peers):
    """Three honest peers and `mal`, which leads the group or does not, as the test asks."""

    def __init__(self, rules: AveragingConfig = RULES, leads: bool = False) -> None:
        super().__init__(*HONEST, "mal", size=60_000, rules=rules)
        while leads != all(precedes(self.id("mal"), self.id(name)) for name in HONEST):
            self.identities["mal"] = Identity.ephemeral()

    async def play(self) -> Told:
        """All average, as the trainer role would, until the honest ones hold round 1."""
        told = Told(set(), [], [])
        liar = asyncio.ensure_future(self._insist())
        try:
            async with asyncio.timeout(15):
                await asyncio.gather(*(self._honest(name, told) for name in HONEST))
        finally:
            liar.cancel()
        return told

    async def _insist(self) -> None:
        while True:
            await self.average("mal")
            await asyncio.sleep(0.05)

    async def _honest(self, name: str, told: Told) -> None:
        node, anchor = self.nodes[name], self.anchor
        while True:
            match next_action(Standing(anchor, True), await node.observer.view(), rounds=1):
                case CatchUp() as action:
                    got = await node.catch_up(action, self.base.size)
                    if not isinstance(got, Missed):
                        anchor = action.anchor
                        await node.hold(anchor, got[0], self.base.size)
                case Average():
                    outcome = await self.average(name)
                    self._note(outcome, told)
                    if isinstance(outcome, Averaged):
                        state = self.base + outcome.delta
                        anchor = Anchor(1, digest_of(state))
                        await node.hold(anchor, state, self.base.size)
                    else:
                        await asyncio.sleep(0.05)
                case _ if self._all_agree():  # as a finished trainer lingers
                    told.digests.add(anchor.digest)
                    return
                case _:
                    await asyncio.sleep(0.01)

    def _all_agree(self) -> bool:
        return len({self.nodes[name]._progress.digest for name in HONEST}) == 1

    def _note(self, outcome: Averaged | Missed, told: Told) -> None:
        mal = self.id("mal")
        if isinstance(outcome, Averaged):
            told.averages.append(outcome)
            cut_down = outcome.group.out_of_proportion()
            told.reasons += [w[mal] for w in (outcome.group.left_out, cut_down) if mal in w]
        elif mal in outcome.culprits:
            told.reasons.append(outcome.reason)
        else:
            told.reasons += [why for peer, why in outcome.left_out if peer == mal]

    # ---- ways to lie

    def declare(self, **lies: Any) -> None:
        """Join the group with other numbers than one's own."""
        theirs = self.nodes["mal"]._lobby
        join = theirs.join

        async def lying(anchor: Anchor, mine: Member) -> Any:
            return await join(anchor, dataclasses.replace(mine, **lies))

        theirs.join = lying  # type: ignore[method-assign]

    def in_reducing(self, change: Callable[[AllReduce], Any]) -> None:
        """Change what one does in the all-reduce."""
        desk = self.nodes["mal"]._desk
        run = desk.run

        async def lying(attempt: AllReduce) -> Any:
            if answer := change(attempt):
                return await answer
            return await run(attempt)

        desk.run = lying  # type: ignore[method-assign]

    def send_instead(self, frame: Callable[[bytes], bytes]) -> None:
        def change(attempt: AllReduce) -> None:
            honest = attempt.work.encoded
            attempt.work.encoded = lambda piece: frame(honest(piece))  # type: ignore[method-assign]

        self.in_reducing(change)

    def reduce_to(self, frame: Callable[[bytes], bytes]) -> None:
        def change(attempt: AllReduce) -> None:
            give = attempt.work.pass_on

            def lying(at: int, average: bytes | None) -> None:
                give(at, average if average is None else frame(average))

            attempt.work.pass_on = lying  # type: ignore[method-assign]

        self.in_reducing(change)


def must_hold(told: Told, *words: str) -> None:
    """What must always hold: the honest end alike, and the liar is named with the reason."""
    assert len(told.digests) == 1
    assert told.reasons, "nobody named the liar"
    for word in words:
        assert any(word in reason for reason in told.reasons), told.reasons
    assert all(np.isfinite(average.delta).all() for average in told.averages)


def without_liar(peers: Lied, told: Told) -> None:
    mal = peers.id("mal")
    assert all(mal not in average.group.peers for average in told.averages)


def scaled(by: float) -> Callable[[bytes], bytes]:
    """The same fp16 chunk with another scale in front."""
    return lambda frame: (np.frombuffer(frame[:4], "<f4") * np.float32(by)).tobytes() + frame[4:]


# ---- lies in what is contributed


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
async def test_a_delta_that_is_not_finite_is_refused_for_the_whole_group(bad):
    peers = await Lied().start()
    peers.send_instead(scaled(bad))
    told = await peers.play()
    must_hold(told, "not finite")
    without_liar(peers, told)


async def test_a_delta_a_thousand_times_larger_than_declared_is_refused():
    peers = await Lied().start()
    peers.send_instead(scaled(1000.0))
    told = await peers.play()
    must_hold(told, "larger than it declared")
    without_liar(peers, told)


async def test_a_delta_that_is_declared_a_thousand_times_too_large_is_cut_down_and_named():
    peers = await Lied().start()
    honest = float(np.linalg.norm(peers.deltas["ann"]))
    peers.deltas["mal"] *= 1000
    told = await peers.play()
    must_hold(told, "times the median")
    assert np.linalg.norm(told.averages[0].delta) < RULES.clip * honest


async def test_a_flipped_sign_moves_the_average_by_no_more_than_its_own_share():
    peers = await Lied().start()
    for name in peers.deltas:
        peers.deltas[name][:] = 1e-3
    peers.deltas["mal"] *= -1
    told = await peers.play()
    assert len(told.digests) == 1
    np.testing.assert_allclose(told.averages[0].delta, 0.5e-3, rtol=1e-3)


async def test_a_flipped_sign_counts_for_nothing_where_the_mean_is_trimmed():
    peers = await Lied(RULES.model_copy(update={"robust": "trimmed_mean"})).start()
    for name in peers.deltas:
        peers.deltas[name][:] = 1e-3
    peers.deltas["mal"] *= -1
    told = await peers.play()
    assert len(told.digests) == 1
    np.testing.assert_allclose(told.averages[0].delta, 1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "weight, leads",
    [(1e30, False), (-10.0, False), (float("nan"), False), (None, False), (1e30, True)],
)
async def test_who_declares_a_weight_out_of_this_world_is_left_out_and_nobody_waits(weight, leads):
    peers = await Lied(PATIENT, leads).start()
    peers.declare(weight=weight)
    must_hold(told := await peers.play(), "sane number" if not leads else "")
    without_liar(peers, told)


async def test_a_weight_far_above_the_others_counts_as_a_multiple_of_theirs():
    peers = await Lied().start()
    peers.declare(weight=1e8)
    told = await peers.play()
    must_hold(told, "weight", "times the median")


@pytest.mark.parametrize("leads", [False, True])
@pytest.mark.parametrize(
    "lie, words",
    [
        (lambda frame: frame[:-2], "sent a chunk of"),
        (lambda frame: frame + b"xx", "are allowed"),
        (lambda frame: frame * 100, "are allowed"),
    ],
)
async def test_a_contribution_of_another_size_is_refused(lie, words, leads):
    peers = await Lied(leads=leads).start()
    peers.send_instead(lie)
    told = await peers.play()
    must_hold(told, words)
    without_liar(peers, told)


@pytest.mark.parametrize("leads", [False, True])
async def test_who_joins_and_then_says_nothing_is_left_out(leads):
    peers = await Lied(leads=leads).start()
    peers.in_reducing(lambda attempt: asyncio.sleep(60))
    told = await peers.play()
    must_hold(told, "")
    without_liar(peers, told)


def leader_among(peers: Lied) -> str:
    """Which of the honest peers the others join."""
    [leader] = [
        a for a in HONEST if all(a == b or precedes(peers.id(a), peers.id(b)) for b in HONEST)
    ]
    return leader


async def test_a_reducer_that_only_ever_says_wait_is_left_out():
    peers = await Lied().start()

    def stall(attempt: AllReduce) -> None:
        attempt.work.pass_on = lambda at, average: None  # type: ignore[method-assign]

    peers.in_reducing(stall)
    told = await peers.play()
    must_hold(told, "says that it waits")
    without_liar(peers, told)


async def test_who_comes_with_a_stale_anchor_is_named():
    peers = await Lied().start()
    theirs = peers.nodes["mal"]._lobby
    leader = leader_among(peers)

    async def lying(anchor: Anchor, mine: Member) -> Any:
        ready = asyncio.get_running_loop().create_future()
        ready.set_result(mine)
        return await theirs._ask(peers.id(leader), Anchor(0, "0" * 64), ready)

    theirs.join = lying  # type: ignore[method-assign]
    told = await peers.play()
    must_hold(told, "stale anchor")
    without_liar(peers, told)


# ---- lies of a reducer


@pytest.mark.parametrize("leads", [False, True])
@pytest.mark.parametrize(
    "lie, words",
    [
        (scaled(np.nan), "not finite"),
        (scaled(1e36), ""),
        (scaled(1000.0), "larger than"),
        (lambda frame: frame[:-2], "sent a chunk of"),
        (lambda frame: frame * 3, ""),
    ],
    ids=["nan", "overflow", "x1000", "short", "long"],
)
async def test_a_reducer_that_returns_garbage_is_left_out(lie, words, leads):
    peers = await Lied(leads=leads).start()
    peers.reduce_to(lie)
    told = await peers.play()
    must_hold(told, words)
    without_liar(peers, told)


async def test_a_reducer_that_tells_each_member_something_else_does_not_split_the_swarm():
    peers = await Lied().start()
    tampered = 0

    def each_another(frame: bytes) -> bytes:
        nonlocal tampered
        if frame[:1] != b"c":
            return frame
        tampered += 1
        return frame[:-1] + bytes([tampered % 50])

    peers.world.tampers[peers.id("mal")] = each_another
    told = await peers.play()
    assert tampered
    assert len(told.digests) == 1


# ---- lies in messages and records


HOSTILE: list[Any] = [
    b"\xc1",
    b"\x00" * 1000,
    {"answer": "group"},
    {"anchor": {"round": "x", "digest": 7}, "member": {}},
    {"anchor": 5, "member": 6},
    {"anchor": {"round": 2**63, "digest": "a" * 10_000}, "member": {"peer": ["x"]}},
    {"group": ["x"] * 1000, "round": "many", "digest": None},
    {"group": "g" * 100_000, "round": -1, "digest": {"a": 1}},
]


async def test_hostile_messages_cost_their_sender_the_stream_and_nobody_else_anything():
    peers = await Lied(PATIENT).start()
    mal = peers.nodes["mal"]
    for message in HOSTILE:
        frame = message if isinstance(message, bytes) else msgpack.packb(message)
        for protocol in (JOIN, REDUCE, ADAPTER):
            stream = await mal._streams.open(peers.id("ann"), protocol)
            await stream.send(frame)
    told = await peers.play()
    assert len(told.digests) == 1
    assert {len(average.group.peers) for average in told.averages} == {4}  # nobody was blamed


async def test_nobody_joins_in_another_name():
    peers = await Lied().start()
    mal = peers.nodes["mal"]._streams
    stream = await mal.open(peers.id(leader_among(peers)), JOIN)
    member = dataclasses.asdict(Member(peers.id("bob"), 1.0, 1.0))
    await send_message(stream, anchor=dataclasses.asdict(peers.anchor))
    assert (await receive_message(stream, 1.0))["answer"] == "wait"
    await send_message(stream, member=member)
    while (answer := await receive_message(stream, 1.0))["answer"] == "wait":
        pass
    assert answer["answer"] == "no"


@pytest.mark.parametrize(
    "change",
    [
        lambda g, me: dataclasses.replace(g, parts=tuple(2**40 for _ in g.parts)),
        lambda g, me: dataclasses.replace(g, parts=tuple(-1 for _ in g.parts)),
        lambda g, me: dataclasses.replace(g, members=g.members + g.members),
        lambda g, me: dataclasses.replace(g, clip=1e9),
        lambda g, me: dataclasses.replace(g, compression="none"),
        lambda g, me: dataclasses.replace(
            g, members=tuple(m if m.peer == me else Member(m.peer, 1e8, 1.0) for m in g.members)
        ),
    ],
    ids=[
        "parts too large",
        "negative parts",
        "twice",
        "other clip",
        "other codec",
        "other weights",
    ],
)
async def test_a_leader_that_proposes_another_group_than_agreed_leads_no_more(change):
    peers = await Lied(leads=True).start()
    closing = peers.nodes["mal"]._lobby.leader._closing

    def lying(here: Any, view: Any) -> Group | None:
        group = closing(here, view)
        return group and change(group, peers.id("mal"))

    peers.nodes["mal"]._lobby.leader._closing = lying  # type: ignore[method-assign]
    told = await peers.play()
    assert len(told.digests) == 1


async def test_a_leader_that_only_ever_says_wait_leads_no_more():
    peers = await Lied(leads=True).start()
    peers.nodes["mal"]._lobby.leader._closing = lambda here, view: None  # type: ignore[method-assign]
    told = await peers.play()
    assert len(told.digests) == 1


async def test_a_record_in_another_name_and_a_replayed_one_change_nothing():
    peers = await Lied().start()
    world, mal = peers.world, peers.identities["mal"]
    key, bob = progress_key(peers.manifest.run_id), peers.id("bob")
    old = world.records[key][bob][0]
    await asyncio.sleep(0.01)
    peers.nodes["bob"].announce(samples=77)
    await asyncio.sleep(0.01)
    seen = await peers.nodes["ann"].observer.view()
    forged = Progress(peer=bob, name="bob", role="trainer", state="leaving", round=9, expires=9e9)
    for envelope in (
        seal(mal, key, bob, forged, 9e9),  # signed by another
        old,  # replayed
        b"garbage",
    ):
        world.records[key][bob] = (envelope, 9e9)  # as a node that checks nothing would keep it
        assert (await peers.nodes["ann"].observer.view()).peers == seen.peers


async def test_a_record_that_has_expired_does_not_bring_its_author_back():
    peers = await Lied().start()
    key, bob = progress_key(peers.manifest.run_id), peers.id("bob")
    long_ago = loop_time() - 60
    expired = Progress(
        peer=bob, name="bob", role="trainer", state="ready", round=0, expires=long_ago
    )
    envelope = seal(peers.identities["bob"], key, bob, expired, long_ago)
    peers.world.records[key][bob] = (envelope, 9e9)
    network = peers.world.join(Identity.ephemeral())
    newcomer = Node(network, Identity.ephemeral(), peers.manifest, QUICK)
    seen = {p.peer for p in (await newcomer.observer.view()).peers}
    assert peers.id("ann") in seen
    assert bob not in seen


async def test_a_donor_that_offers_another_size_is_not_listened_to():
    peers = await Lied().start()

    async def endless(stream: Any) -> None:
        await receive_message(stream, 1.0)
        await send_message(stream, size=2**50)
        while True:
            await stream.send(b"\0" * 4 * 65_536)
            await asyncio.sleep(0)

    await peers.nodes["mal"]._streams.serve(ADAPTER, endless)
    got = await peers.nodes["ann"].catch_up(
        CatchUp(peers.anchor, (peers.id("mal"), peers.id("bob"))), peers.base.size
    )
    assert not isinstance(got, Missed)
    assert got[1] == (peers.id("bob"),)


@pytest.mark.parametrize(
    "lie",
    [
        lambda frame: frame[:-4] + b"\0\0\0\1" if len(frame) > 10_000 else frame,
        lambda frame: frame[:-4] if len(frame) > 10_000 else frame,
        lambda frame: frame.replace(b"leaves", b"loaves"),
    ],
    ids=["another value", "too short", "no leaves"],
)
async def test_what_a_donor_sends_of_another_adapter_is_taken_from_the_others(lie):
    peers = await Lied().start()
    peers.world.tampers[peers.id("mal")] = lie
    action = CatchUp(peers.anchor, (peers.id("mal"), peers.id("bob"), peers.id("cat")))
    got = await peers.nodes["ann"].catch_up(action, peers.base.size)
    assert not isinstance(got, Missed)
    np.testing.assert_array_equal(got[0], peers.base)
    assert peers.id("mal") not in got[1]


async def test_a_frame_longer_than_allowed_is_refused_before_anything_is_allocated():
    reader = asyncio.StreamReader()
    stream = DaemonStream("mal", reader, Mock())
    reader.feed_data((2**32 - 1).to_bytes(4, "big") + b"x" * 100)
    with pytest.raises(NetworkError, match="are allowed"):
        await stream.receive(1024)
