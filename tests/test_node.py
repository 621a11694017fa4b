"""The round protocol over the in-process network: the same code that runs over libp2p."""

import asyncio
import dataclasses
import math
from collections.abc import Mapping
from typing import Self

import numpy as np
import pytest

from p2pllm.config.run import AveragingConfig, DataConfig, Deadline, ModelConfig, RunConfig
from p2pllm.coverage import Span
from p2pllm.digest import digest_of
from p2pllm.swarm import network
from p2pllm.swarm.allreduce import REDUCE
from p2pllm.swarm.identity import Identity
from p2pllm.swarm.leader import HELLO, JOIN
from p2pllm.swarm.link import INSTANT, Link
from p2pllm.swarm.manifest import Manifest
from p2pllm.swarm.memory_network import MemoryNetwork, World
from p2pllm.swarm.network import HUNG_UP, DialledTooSoon, Timeouts, loop_time
from p2pllm.swarm.node import Averaged, Contribution, Missed, Node
from p2pllm.swarm.records import Progress
from p2pllm.swarm.rounds import Anchor, CatchUp, precedes

QUICK = Timeouts(
    dial=0.2,
    silence=0.3,
    record=0.5,
    heartbeat=0.05,
    look=0.05,
    announce=0.1,
    record_life=1.0,
    start=1.0,
)
RULES = AveragingConfig(deadline=Deadline(floor=0.3, ceiling=1.0))


NOTHING: Mapping[str, tuple[Span, ...]] = {}


class Peers:
    """A few nodes of one run in one event loop, all holding the same anchor."""

    def __init__(
        self,
        *names: str,
        size: int = 200_000,
        rules: AveragingConfig = RULES,
        timeouts: Timeouts = QUICK,
        link: Link = INSTANT,
    ) -> None:
        self.world, self.timeouts = World(), timeouts
        self.links = dict.fromkeys(names, link)
        self.identities = {name: Identity.ephemeral() for name in names}
        run = RunConfig(
            name="test",
            model=ModelConfig(name="x"),
            data=DataConfig(source="y"),
            averaging=rules,
        )
        self.manifest = Manifest.found(run, Identity.ephemeral())
        self.base = np.random.default_rng(0).normal(size=size).astype(np.float32)
        self.anchor = Anchor(0, digest_of(self.base))
        self.nodes: dict[str, Node] = {}
        self.deltas = {
            name: np.random.default_rng(seed).normal(scale=1e-3, size=size).astype(np.float32)
            for seed, name in enumerate(names, 1)
        }

    async def start(self, *clients: str) -> Self:
        for name, identity in self.identities.items():
            network = self.world.join(identity, name not in clients, self.links[name])
            node = Node(network, identity, self.manifest, self.timeouts)
            await node.enter(
                Progress(
                    peer=identity.peer_id,
                    name=name,
                    role="trainer",
                    state="training",
                    round=0,
                    dialable=name not in clients,
                )
            )
            await node.hold(self.anchor, self.base, self.base.size)
            self.nodes[name] = node
        return self

    def id(self, name: str) -> str:
        return self.identities[name].peer_id

    async def average(
        self, name: str, samples: float = 10.0, spans: tuple[Span, ...] = ()
    ) -> Averaged | Missed:
        node = self.nodes[name]
        node.announce(state="ready")
        mine = Contribution(self.anchor, self.deltas[name], samples, spans=spans)
        return await node.average(mine)

    async def average_all(
        self, *names: str, spans: Mapping[str, tuple[Span, ...]] = NOTHING
    ) -> list[Averaged | Missed]:
        return await asyncio.gather(
            *(self.average(name, spans=spans.get(name, ())) for name in names or self.nodes)
        )

    @property
    def in_order(self) -> list[str]:
        """Names, by who leads."""
        ids = {name: self.id(name) for name in self.nodes}
        return sorted(ids, key=lambda n: sum(precedes(other, ids[n]) for other in ids.values()))

    def kill(self, name: str) -> None:
        self.world.kill(self.id(name))
        for task in self.nodes.pop(name)._tasks:
            task.cancel()


def deltas_of(results: list[Averaged | Missed]) -> list[np.ndarray]:
    assert all(isinstance(r, Averaged) for r in results), results
    return [r.delta for r in results if isinstance(r, Averaged)]


async def test_a_group_never_holds_two_that_trained_on_the_same_rows():
    peers = await Peers("ann", "bob", "cat").start()
    spans = {
        "ann": (Span(0, 0, 8),),
        "bob": (Span(1, 0, 8), Span(0, 0, 4)),
        "cat": (Span(2, 0, 8),),
    }
    results = dict(zip(peers.nodes, await peers.average_all(spans=spans), strict=True))
    [missed] = [r for r in results.values() if isinstance(r, Missed)]
    assert "rows that another member" in missed.reason
    assert isinstance(results["cat"], Averaged)
    group = results["cat"].group
    assert len(group.members) == 2
    assert {m.spans for m in group.members} < set(spans.values())
    [name] = [name for name, result in results.items() if result is missed]
    assert "rows" in group.left_out[peers.id(name)]


async def test_all_who_come_are_told_when_the_group_closes_without_them():
    peers = await Peers("ann", "bob", "cat").start()
    for node in peers.nodes.values():
        node.approach(peers.anchor)
    await asyncio.sleep(0.2)
    assert {node.closes_at for node in peers.nodes.values()} == {None}  # nobody waits yet
    first = asyncio.ensure_future(peers.average("ann"))
    second = asyncio.ensure_future(peers.average("bob"))
    await asyncio.sleep(0.2)
    closes = {node.closes_at for node in peers.nodes.values()}
    ceiling = RULES.deadline.ceiling
    assert all(at == pytest.approx(loop_time() - 0.2 + ceiling, abs=0.1) for at in closes)
    results = await asyncio.gather(first, second, peers.average("cat"))
    assert all(isinstance(result, Averaged) for result in results)
    for node in peers.nodes.values():
        node.approach(peers.anchor)
        assert node.closes_at is None


async def test_a_round_that_is_over_without_us_needs_no_more_steps():
    peers = await Peers("ann", "bob", "cat").start()
    late = peers.nodes["cat"]
    late.approach(peers.anchor)
    await asyncio.sleep(0.2)
    assert late.closes_at is None
    for name in ("ann", "bob"):
        await peers.nodes[name].hold(Anchor(1, "b" * 64), peers.base, peers.base.size)
    await asyncio.sleep(1)
    assert late.closes_at == -math.inf


async def test_who_catches_up_joins_the_others_before_its_record_is_there():
    peers = await Peers("ann", "bob", "cat", timeouts=Timeouts()).start()
    back, *others = peers.in_order  # it would lead

    async def lose(*record):
        return True

    peers.world.peers[peers.id(back)].put = lose  # type: ignore[method-assign]
    peers.anchor = Anchor(1, peers.anchor.digest)
    for name in others:
        await peers.nodes[name].hold(peers.anchor, peers.base, peers.base.size)
        peers.nodes[name].approach(peers.anchor)
    await asyncio.sleep(5)
    await peers.nodes[back].hold(peers.anchor, peers.base, peers.base.size)
    peers.nodes[back].approach(peers.anchor)
    await asyncio.sleep(0.1)
    ready = asyncio.ensure_future(peers.average_all(*others))
    await asyncio.sleep(0.5)
    averaged = [await peers.average(back), *await ready]
    assert len({digest_of(delta) for delta in deltas_of(averaged)}) == 1


@pytest.mark.parametrize("place", [0, 1])  # the leader, and another
async def test_who_still_receives_the_average_is_waited_for_in_the_next_round(place):
    rules = AveragingConfig(deadline=Deadline(floor=5, ceiling=60))
    peers = await Peers("ann", "bob", "cat", rules=rules, timeouts=Timeouts()).start()
    others = peers.in_order
    slow = others.pop(place)
    deltas_of(await peers.average_all())
    peers.anchor = Anchor(1, "1" * 64)
    for name in others:
        await peers.nodes[name].hold(peers.anchor, peers.base, peers.base.size)
        peers.nodes[name].approach(peers.anchor)
    await asyncio.sleep(4)  # its record has been renewed meanwhile
    ready = asyncio.ensure_future(peers.average_all(*others))
    await asyncio.sleep(0.5)
    await peers.nodes[slow].hold(peers.anchor, peers.base, peers.base.size)
    averaged = [await peers.average(slow), *await ready]
    assert len({digest_of(delta) for delta in deltas_of(averaged)}) == 1


@pytest.mark.parametrize(("early", "seconds"), [(3, 15.0), (2, 19.0)])
async def test_who_went_later_to_a_leader_that_fell_silent_is_waited_for(early, seconds):
    rules = AveragingConfig(deadline=Deadline(floor=5, ceiling=60))
    peers = await Peers("ann", "bob", "cat", "dan", rules=rules, timeouts=Timeouts()).start()
    silent, *others = peers.in_order
    for node in peers.nodes.values():
        node._lobby.leader._waits.append(1.0)  # the deadline is the floor

    async def say_nothing(stream):
        await asyncio.sleep(60)

    for protocol in (JOIN, HELLO):
        await peers.nodes[silent]._streams.serve(protocol, say_nothing)
    began = loop_time()
    for name in others[:early]:
        peers.nodes[name].approach(peers.anchor)
    await asyncio.sleep(8)
    deltas = deltas_of(await peers.average_all(*others))
    assert len({digest_of(delta) for delta in deltas}) == 1
    assert loop_time() - began < seconds


async def test_nobody_is_told_to_hurry_while_there_are_too_few_for_a_round():
    peers = await Peers("ann", "bob", rules=RULES.model_copy(update={"min_peers": 2})).start()
    peers.nodes["bob"].approach(peers.anchor)
    first = asyncio.ensure_future(peers.average("ann"))
    await asyncio.sleep(0.3)
    assert peers.nodes["bob"].closes_at is None
    await peers.average("bob")
    await first


async def test_everybody_ends_with_the_same_bits():
    peers = await Peers("ann", "bob", "cat", "dan").start()
    deltas = deltas_of(await peers.average_all())
    assert len({digest_of(d) for d in deltas}) == 1
    mean = np.mean(list(peers.deltas.values()), axis=0)
    assert np.abs(deltas[0] - mean).max() < 2e-6  # two roundings to fp16 of values near 1e-3


async def test_the_average_is_weighted_by_samples():
    peers = await Peers(
        "ann", "bob", rules=RULES.model_copy(update={"compression": "none"})
    ).start()
    results = await asyncio.gather(peers.average("ann", 30.0), peers.average("bob", 10.0))
    expected = 0.75 * peers.deltas["ann"] + 0.25 * peers.deltas["bob"]
    for delta in deltas_of(list(results)):
        np.testing.assert_allclose(delta, expected, atol=1e-9)


async def test_a_lone_trainer_commits_by_itself():
    peers = await Peers("ann", rules=RULES.model_copy(update={"compression": "none"})).start()
    [delta] = deltas_of(await peers.average_all())
    np.testing.assert_array_equal(delta, peers.deltas["ann"])


async def test_the_group_closes_as_soon_as_the_last_one_is_ready():
    rules = AveragingConfig(deadline=Deadline(floor=30, ceiling=60))
    peers = await Peers("ann", "bob", "cat", rules=rules).start()
    started = loop_time()
    first = asyncio.gather(peers.average("ann"), peers.average("bob"))
    await asyncio.sleep(0.2)
    results = [await peers.average("cat"), *await first]
    assert len({digest_of(d) for d in deltas_of(results)}) == 1
    assert loop_time() - started < 5


async def test_the_group_gathers_while_its_members_still_train(monkeypatch):
    peers = await Peers("ann", "bob", "cat").start()
    for node in peers.nodes.values():
        node.approach(peers.anchor)
    await asyncio.sleep(0.3)
    opened, dial = [], MemoryNetwork.open

    async def noted(self, peer, protocol):
        opened.append(protocol)
        return await dial(self, peer, protocol)

    monkeypatch.setattr(MemoryNetwork, "open", noted)
    deltas_of(await peers.average_all())
    assert opened  # the all-reduce's streams, and nothing else: everybody sat there already
    assert all(protocol.startswith(REDUCE) for protocol in opened)


async def test_a_late_peer_is_left_out_at_the_deadline_and_named():
    peers = await Peers("ann", "bob", "cat").start()
    results = await peers.average_all("ann", "bob")
    for result in results:
        assert isinstance(result, Averaged)
        assert set(result.group.peers) == {peers.id("ann"), peers.id("bob")}
        assert "not ready" in result.group.left_out[peers.id("cat")]


async def test_a_dead_peer_is_noticed_before_the_deadline():
    rules = AveragingConfig(deadline=Deadline(floor=30, ceiling=60))
    peers = await Peers("ann", "bob", "cat", rules=rules).start()
    peers.kill("cat")
    started = loop_time()
    deltas_of(await peers.average_all("ann", "bob"))
    assert loop_time() - started < 5


async def test_a_peer_that_cannot_be_dialled_takes_part_and_reduces_nothing():
    peers = await Peers("ann", "bob", "cat").start("cat")
    results = await peers.average_all()
    assert len({digest_of(d) for d in deltas_of(results)}) == 1
    group = results[0].group  # type: ignore[union-attr]
    assert group.parts[group.peers.index(peers.id("cat"))] == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
async def test_a_delta_that_is_not_finite_is_never_offered(bad):
    peers = await Peers("ann", "bob").start()
    peers.deltas["ann"][7] = bad
    result = await peers.average("ann")
    assert isinstance(result, Missed)


async def test_survivors_retry_without_a_peer_whose_contribution_is_refused():
    peers = await Peers("ann", "bob", "cat").start()
    liar = peers.nodes["cat"]
    join = liar._lobby.join

    async def understate(anchor, mine):
        return await join(anchor, dataclasses.replace(mine, norm=mine.norm / 10))

    liar._lobby.join = understate  # type: ignore[method-assign]
    # The lie shows in its own check too, so let it believe in its group.
    first = await peers.average_all()
    assert all(isinstance(r, Missed) for r in first)
    blamed = {c for r in first if isinstance(r, Missed) for c in r.culprits}
    assert peers.id("cat") in blamed
    second = await peers.average_all("ann", "bob")
    assert len({digest_of(d) for d in deltas_of(second)}) == 1


def break_streams(peers: Peers, one: str, other: str, attempts: int) -> None:
    """In the next attempts, as soon as they are open, although both are well."""
    node, left = peers.nodes[one], attempts
    run = node._desk.run

    async def broken(attempt):
        def hang_up():
            for exchange in attempt._exchanges:
                if exchange.stream.peer == peers.id(other):
                    for end in (exchange.stream, exchange.stream._other):
                        end._hung_up = True
                        end._inbox.put_nowait(end._END)

        nonlocal left
        left -= 1
        if left >= 0:
            asyncio.get_running_loop().call_later(0.15, hang_up)
        return await run(attempt)

    node._desk.run = broken  # type: ignore[method-assign]


@pytest.mark.parametrize(("broken", "in_the_end"), [(1, 3), (2, 2)])
async def test_who_still_answers_after_a_stream_broke_has_one_more_chance(broken, in_the_end):
    link = Link(latency=0.01, bandwidth=1_000_000)
    peers = await Peers("ann", "bob", "cat", link=link, timeouts=Timeouts()).start()
    break_streams(peers, "ann", "bob", broken)
    for _ in range(broken):
        results = await peers.average_all()
        assert all(isinstance(r, Missed) and r.reason.endswith(HUNG_UP) for r in results), results
        await asyncio.sleep(1)
    results = await peers.average_all()
    averaged = [r for r in results if isinstance(r, Averaged)]
    assert len({digest_of(r.delta) for r in averaged}) == 1
    assert [len(r.group.peers) for r in averaged] == [in_the_end] * in_the_end


async def test_a_peer_cut_off_in_the_middle_leaves_the_others_nothing_half_done():
    peers = await Peers("ann", "bob", "cat", size=2_000_000).start()
    frames = 0

    def stall(frame: bytes) -> bytes:
        nonlocal frames
        frames += len(frame) > 10_000
        if frames > 3:
            peers.world.cut(peers.id("cat"))
        return frame

    peers.world.tampers[peers.id("cat")] = stall
    first = await peers.average_all()
    assert all(isinstance(r, Missed) for r in first), first
    retried = await peers.average_all("ann", "bob")
    assert len({digest_of(d) for d in deltas_of(retried)}) == 1


async def test_a_newcomer_takes_the_committed_adapter_from_another_donor_when_the_first_lies():
    peers = await Peers("ann", "bob", "cat").start()
    peers.world.tampers[peers.id("ann")] = lambda f: (
        f[:-1] + bytes([f[-1] ^ 1]) if len(f) > 1000 else f
    )
    action = CatchUp(peers.anchor, (peers.id("ann"), peers.id("bob")))
    got = await peers.nodes["cat"].catch_up(action, peers.base.size)
    assert not isinstance(got, Missed)
    values, donors = got
    assert digest_of(values) == peers.anchor.digest
    assert donors == (peers.id("bob"),)


async def test_who_comes_with_a_stale_anchor_is_told_so_and_commits_nothing_alone():
    peers = await Peers("ann", "bob", "cat").start()
    ahead = peers.base + 1
    for name in ("ann", "bob"):
        await peers.nodes[name].hold(Anchor(1, digest_of(ahead)), ahead, ahead.size)
    result = await peers.average("cat")
    assert isinstance(result, Missed)
    assert "round 1" in result.reason


async def test_nothing_can_hang_a_member_whose_group_falls_silent():
    peers = await Peers("ann", "bob", "cat").start()
    for name in ("bob", "cat"):
        # They join the group, and then say nothing.
        peers.nodes[name]._desk.run = lambda attempt: asyncio.sleep(60)  # type: ignore[assignment, return-value]
    waiting = [asyncio.ensure_future(peers.average(name)) for name in ("bob", "cat")]
    result = await asyncio.wait_for(peers.average("ann"), 10)
    assert isinstance(result, Missed)
    for task in waiting:
        task.cancel()


async def test_several_donors_deliver_an_adapter_together_and_a_slow_one_holds_nobody_up():
    peers = Peers("ann", "bob", "cat", "dan", size=40 * 65_536 + 7, link=Link(0.01, 10_000_000))
    peers.links["dan"] = Link(0.01, 50_000)  # alone, it would take three minutes
    await peers.start()
    donors = tuple(peers.id(name) for name in ("dan", "bob", "cat"))
    began = loop_time()
    got = await peers.nodes["ann"].catch_up(CatchUp(peers.anchor, donors), peers.base.size)
    assert not isinstance(got, Missed)
    np.testing.assert_array_equal(got[0], peers.base)
    assert {peers.id("bob"), peers.id("cat")} <= set(got[1])
    assert loop_time() - began < 8.0


LINE = Link(0.01, 2_000_000)


async def test_a_donor_that_dies_in_the_middle_is_replaced_by_the_next():
    peers = await Peers(
        "ann", "bob", "cat", size=40 * 65_536, link=LINE, timeouts=Timeouts()
    ).start()
    action = CatchUp(peers.anchor, (peers.id("bob"), peers.id("cat")))
    getting = asyncio.ensure_future(peers.nodes["ann"].catch_up(action, peers.base.size))
    await asyncio.sleep(2.0)
    assert not getting.done()
    peers.kill("bob")
    got = await getting
    assert not isinstance(got, Missed)
    np.testing.assert_array_equal(got[0], peers.base)


async def test_a_reducer_that_was_dialled_too_soon_is_dialled_again(monkeypatch):
    peers = await Peers("ann", "bob", "cat").start()
    refused, dial = set(), MemoryNetwork.open

    async def at_first_too_soon(self, peer, protocol):
        if protocol.startswith(REDUCE) and (self.me, peer) not in refused:
            refused.add((self.me, peer))
            raise DialledTooSoon("dial backoff")
        return await dial(self, peer, protocol)

    monkeypatch.setattr(network, "_AGAIN", 0.05)
    monkeypatch.setattr(MemoryNetwork, "open", at_first_too_soon)
    deltas_of(await peers.average_all())
    assert len(refused) == 6
