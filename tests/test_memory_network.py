"""The simulated lines are what they say, and the protocol is right and quick over them.

All in virtual time: a second here is no second of the test.
"""

import asyncio
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from p2pllm.config.run import AveragingConfig, Deadline
from p2pllm.digest import digest_of
from p2pllm.swarm.codec import encoded_size
from p2pllm.swarm.identity import Identity
from p2pllm.swarm.link import INSTANT, Link
from p2pllm.swarm.memory_network import World
from p2pllm.swarm.network import NetworkError, Stream, Timeouts, loop_time
from p2pllm.swarm.node import Averaged, Contribution, Missed
from p2pllm.swarm.rounds import (
    Anchor,
    Average,
    CatchUp,
    Finish,
    Standing,
    Train,
    next_action,
)
from p2pllm.swarm.virtual_time import NothingWillHappen, run
from tests.test_node import Peers

SLOW = Link(latency=0.025, bandwidth=2_500_000)  # 20 Mbit/s; a round trip of 100 ms between two
RULES = AveragingConfig(min_peers=2, deadline=Deadline(floor=10.0, ceiling=30.0))


class Wire:
    """Streams from one peer to others; what arrives is noted with its time."""

    def __init__(self, *links: Link, seed: int = 0) -> None:
        self.world = World(seed=seed)
        self.networks = [self.world.join(Identity.ephemeral(), link=link) for link in links]
        self.arrived: list[tuple[float, int]] = []

    async def open(self, one: int, two: int) -> Stream:
        async def note(stream: Stream) -> None:
            while True:
                frame = await stream.receive(1 << 24)
                self.arrived.append((loop_time(), len(frame)))

        await self.networks[two].serve("note", note)
        return await self.networks[one].open(self.networks[two].me, "note")

    async def times(self) -> list[float]:
        await asyncio.sleep(1000)
        return [at for at, _ in self.arrived]


async def test_opening_a_stream_and_the_record_table_take_a_round_trip():
    wire = Wire(Link(latency=0.01), Link(latency=0.03))
    await wire.open(0, 1)
    assert loop_time() == pytest.approx(0.08)
    await wire.networks[0].get("key")
    assert loop_time() == pytest.approx(0.12)


async def test_a_frame_takes_its_size_over_the_bandwidth_and_then_the_latency():
    wire = Wire(Link(0.01, 1000.0), Link(0.03, 4000.0))
    stream = await wire.open(0, 1)
    began = loop_time()
    await stream.send(b"x" * 500)
    assert loop_time() == began  # it fits into the buffer
    await stream.send(b"x" * 100)
    assert await wire.times() == pytest.approx([began + 0.54, began + 0.64])


async def test_a_slow_receiver_takes_its_own_time():
    wire = Wire(Link(0.0, 4000.0), Link(0.0, 1000.0))
    stream = await wire.open(0, 1)
    for _ in range(3):
        await stream.send(b"x" * 500)
    assert await wire.times() == pytest.approx([0.5, 1.0, 1.5])


async def test_two_streams_share_a_line_up_and_a_line_down():
    wire = Wire(*[Link(0.0, 1000.0)] * 4)
    for one, two in ((0, 2), (0, 3), (1, 3)):
        await (await wire.open(one, two)).send(b"x" * (one + 1) * 100)
    # Up from 0: 0 to 0.1 and 0.1 to 0.2. Down to 3: first the 200 bytes from 1, then those from 0.
    assert await wire.times() == pytest.approx([0.1, 0.2, 0.3])
    assert [size for _, size in wire.arrived] == [100, 200, 100]


async def test_send_returns_when_no_more_than_the_buffer_waits_for_the_line():
    wire = Wire(Link(0.0, 65_536.0), INSTANT)
    stream = await wire.open(0, 1)
    began = loop_time()
    for _ in range(3):
        await stream.send(b"x" * 65_536)
    assert loop_time() - began == pytest.approx(2.0)


async def test_hanging_up_overtakes_nothing():
    wire = Wire(SLOW, SLOW)
    stream = await wire.open(0, 1)
    for _ in range(20):
        await stream.send(b"x" * 10_000)
    stream.close()
    assert len(await wire.times()) == 20
    with pytest.raises(NetworkError):
        await stream.send(b"more")


async def test_who_sends_learns_a_one_way_trip_later_that_the_other_hung_up():
    wire = Wire(SLOW, SLOW)
    stream = await wire.open(0, 1)
    wire.world.kill(wire.networks[1].me)
    await asyncio.sleep(0.04)
    await stream.send(b"into nothing")
    await asyncio.sleep(0.02)
    with pytest.raises(NetworkError, match="hung up"):
        await stream.send(b"more")


async def lossy(seed: int, loss: float = 0.05) -> list[tuple[float, int]]:
    wire = Wire(Link(0.01, 1e6, loss), Link(0.01, 1e6), seed=seed)
    stream = await wire.open(0, 1)
    for size in range(1000, 1100):
        await stream.send(b"x" * size)
    await wire.times()
    return wire.arrived


def test_loss_makes_it_slower_and_never_wrong():
    intact, lost = run(lossy(1, loss=0.0)), run(lossy(1))
    assert [size for _, size in lost] == [size for _, size in intact] == list(range(1000, 1100))
    assert lost[-1][0] > intact[-1][0] + 0.04


def test_the_same_seed_gives_the_same_trace_and_another_one_another():
    assert run(lossy(1)) == run(lossy(1))
    assert run(lossy(1)) != run(lossy(2))


async def test_what_is_sent_during_a_cut_arrives_in_order_after_it():
    for link in (INSTANT, SLOW):
        wire = Wire(link, link)
        stream = await wire.open(0, 1)
        wire.world.cut(wire.networks[1].me)
        for size in (10, 20, 30):
            await stream.send(b"x" * size)
        await asyncio.sleep(5)
        assert not wire.arrived
        wire.world.heal(wire.networks[1].me)
        await stream.send(b"x" * 40)
        await wire.times()
        assert [size for _, size in wire.arrived] == [10, 20, 30, 40]


# ---- the protocol over such lines


class Lives(Peers):
    """Peers that live as the trainer role does, with a local epoch that only takes its time."""

    def __init__(self, *names: str, rounds: int = 1, epoch: float = 0.0, **how: Any) -> None:
        usual: dict[str, Any] = {"timeouts": Timeouts(), "rules": RULES, "link": SLOW}
        super().__init__(*names, **usual | how)
        for name in names:  # the same leaders in each run
            key = Ed25519PrivateKey.from_private_bytes(name.encode().ljust(32))
            self.identities[name] = Identity(key)
        self.rounds, self.epoch = rounds, epoch
        self.averages: list[Averaged] = []
        self.missed: list[Missed] = []

    async def play(self) -> set[Anchor]:
        """What everybody holds in the end."""
        return set(await asyncio.gather(*(self._live(name) for name in self.nodes)))

    async def _live(self, name: str) -> Anchor:
        node, anchor, state, has_trained = self.nodes[name], self.anchor, self.base, False
        while True:
            view = await node.observer.view(10.0 if has_trained else 0.0)
            match next_action(Standing(anchor, has_trained), view, self.rounds):
                case CatchUp() as action:
                    got = await node.catch_up(action, state.size)
                    if isinstance(got, Missed):
                        self.missed.append(got)
                        await asyncio.sleep(1.0)
                        continue
                    anchor, state, has_trained = action.anchor, got[0], False
                    await node.hold(anchor, state, state.size)
                case Train():
                    node.announce(state="training")
                    node.approach(anchor)
                    await asyncio.sleep(self.epoch)
                    has_trained = True
                    node.announce(state="ready")
                case Average():
                    outcome = await node.average(Contribution(anchor, self.deltas[name], 10.0))
                    if isinstance(outcome, Missed):
                        self.missed.append(outcome)
                        await asyncio.sleep(1.0)
                        continue
                    self.averages.append(outcome)
                    state, has_trained = state + outcome.delta, False
                    anchor = Anchor(anchor.round + 1, digest_of(state))
                    await node.hold(anchor, state, state.size)
                case Finish() if self._all_agree():
                    return anchor
                case Finish():
                    await asyncio.sleep(0.5)

    def _all_agree(self) -> bool:
        held = {(n._progress.round, n._progress.digest) for n in self.nodes.values()}
        return len(held) == 1


FOUR = ("ann", "bob", "cat", "dan")


@pytest.mark.parametrize("compression", ["fp16", "int8"])
async def test_a_round_over_slow_lines_takes_little_more_than_the_wire(compression):
    rules = RULES.model_copy(update={"compression": compression})
    peers = await Lives(*FOUR, size=2_500_000, epoch=5.0, rules=rules).start()
    assert len(await peers.play()) == 1
    wire = 2 * 3 / 4 * encoded_size(peers.base.size, compression) / 2_500_000
    reducing = max(a.seconds_reducing for a in peers.averages)
    forming = max(a.seconds_forming for a in peers.averages)
    print(f"wire {wire:.2f} s, forming {forming:.2f} s, reducing {reducing:.2f} s")
    assert len(peers.averages) == 4
    assert wire < forming + reducing <= 1.15 * wire + 4 * 0.1


async def test_a_cut_during_the_all_reduce_ends_with_equal_digests():
    peers = await Lives(*FOUR, rounds=2, epoch=1.0, size=2_500_000).start()
    playing = asyncio.ensure_future(peers.play())
    await asyncio.sleep(3.0)
    assert not peers.averages
    peers.world.cut(peers.id("bob"))
    await asyncio.sleep(20.0)
    peers.world.heal(peers.id("bob"))
    assert {a.round for a in await playing} == {2}
    assert any(peers.id("bob") in missed.culprits for missed in peers.missed)


async def test_a_partition_heals_to_one_adapter():
    peers = await Lives(*FOUR, rounds=8, epoch=10.0, size=100_000).start()
    playing = asyncio.ensure_future(peers.play())
    await asyncio.sleep(15.0)
    ann, bob, cat, dan = (peers.id(name) for name in FOUR)
    peers.world.part({ann, bob}, {cat, dan})
    await asyncio.sleep(60.0)
    assert not playing.done()
    peers.world.unite()
    assert {a.round for a in await playing} == {8}
    assert {len(a.group.members) for a in peers.averages[-4:]} == {4}


async def test_hours_of_a_swarm_with_one_slow_line_pass_in_a_moment():
    names = tuple(f"peer-{n}" for n in range(8))
    peers = Lives(*names, rounds=20, epoch=60.0, size=100_000)
    peers.links["peer-3"] = Link(0.1, 125_000, loss=0.01)
    await peers.start()
    [end] = await peers.play()
    assert end.round == 20
    assert not peers.missed
    waited = loop_time() / 20 - 60.0
    print(f"{waited:.2f} s a round beside the local epoch")
    assert 2.8 < waited < 8.0  # its line alone needs 2.8 s for a round's bytes


def test_a_whole_run_takes_the_same_course_each_time():
    async def course() -> list[tuple[float, float, int]]:
        lossy = Link(0.025, 2_500_000, loss=0.01)
        peers = await Lives(*FOUR, rounds=3, epoch=5.0, size=300_000, link=lossy).start()
        await peers.play()
        return [(a.seconds_forming, a.seconds_reducing, a.bytes_sent) for a in peers.averages]

    assert run(course()) == run(course())


def test_who_waits_for_what_never_comes_is_told_so_instead_of_hanging():
    async def for_ever() -> None:
        await asyncio.Event().wait()

    with pytest.raises(NothingWillHappen):
        run(for_ever())
