"""What goes over the lines just before a local epoch ends. In virtual time."""

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from p2pllm.swarm import virtual_time
from p2pllm.swarm.identity import Identity
from p2pllm.swarm.link import Link
from p2pllm.swarm.memory_network import MemoryNetwork, World
from p2pllm.swarm.network import NetworkError, Stream, Timeouts, loop_time, receive, send
from p2pllm.swarm.node import Averaged
from p2pllm.swarm.rounds import Anchor
from p2pllm.swarm.swarm import Swarm
from p2pllm.swarm.warmup import WARM_UP, WarmUp
from tests.churn import Churn
from tests.test_node import Peers

LONG = Link(latency=0.025)  # a round trip of 100 ms between two
KIB = 1024


class Pair:
    """One that warms up, and another one; `came` are the bursts that arrive there: when, and of
    how many bytes."""

    def __init__(self, link: Link = LONG) -> None:
        world = World()
        self.me, self.other = (world.join(Identity.ephemeral(), link=link) for _ in range(2))
        self.came: list[tuple[float, int]] = []
        self.warm_up = WarmUp(self.me, Timeouts())

    async def meet(self) -> None:
        await self.other.serve(WARM_UP, self._note)

    async def _note(self, stream: Stream) -> None:
        while True:
            frame = await receive(stream, 1 << 20, 5.0)
            self.came.append((loop_time(), len(frame)))
            await send(stream, b"g", 5.0)

    def group(self, size: int, waited: float = 0.1, other: MemoryNetwork | None = None) -> Any:
        """The last one, of two that reduce half of the values each."""
        peers = (self.me.me, (other or self.other).me)
        parts = (size // 2, size // 2)
        return SimpleNamespace(peers=peers, parts=parts, compression="fp16", waited=waited)

    @property
    def bursts(self) -> list[int]:
        return [size // KIB for _, size in self.came]


def played(act: Callable[[Pair], Awaitable[None]], link: Link = LONG) -> Pair:
    """What has come of it after some seconds."""

    async def play() -> Pair:
        pair = Pair(link)
        await pair.meet()
        await act(pair)
        await asyncio.sleep(30)
        return pair

    return virtual_time.run(play())


def test_bursts_double_until_the_epoch_ends():
    async def act(pair):
        pair.warm_up.plan(pair.group(10_000_000))
        pair.warm_up.expect(10.0)

    pair = played(act)
    assert pair.bursts == [16, 32, 64, 128, 256]
    first, *_, last = [at for at, _ in pair.came]
    assert first > 9.5
    assert last < 10.2  # half a second before the end, a dial, and four answers


@pytest.mark.parametrize(("values", "bursts"), [(1_000_000, [16, 32, 64, 128]), (60_000, [])])
def test_an_eighth_of_what_the_round_itself_sends_is_not_exceeded(values, bursts):
    async def act(pair):
        pair.warm_up.plan(pair.group(values))
        pair.warm_up.expect(1.0)

    pair = played(act)
    assert pair.bursts == bursts
    assert sum(size for _, size in pair.came) <= 2 * values / 8


def test_a_short_line_needs_no_more_than_one_burst():
    async def act(pair):
        pair.warm_up.plan(pair.group(10_000_000))
        pair.warm_up.expect(1.0)

    assert played(act, Link(latency=0.0005)).bursts == [16]


@pytest.mark.parametrize("waited", [None, 1.5])
def test_it_is_left_where_nobody_will_be_there_in_time(waited):
    async def act(pair):
        pair.warm_up.plan(pair.group(10_000_000, waited) if waited else None)
        pair.warm_up.expect(1.0)

    assert played(act).bursts == []


def test_the_last_word_counts_and_once_in_a_local_epoch():
    async def act(pair):
        pair.warm_up.plan(pair.group(1_000_000))
        for left in (10.0, 4.0, 3.0):
            pair.warm_up.expect(left)
        await asyncio.sleep(2.8)
        pair.warm_up.expect(0.2)

    pair = played(act)
    assert pair.bursts == [16, 32, 64, 128]
    assert 2.5 < pair.came[0][0] < 2.7


def test_it_ends_with_the_local_epoch():
    async def act(pair):
        pair.warm_up.plan(pair.group(10_000_000))
        pair.warm_up.expect(1.0)
        await asyncio.sleep(0.75)
        pair.warm_up.end()
        pair.warm_up.expect(1.0)

    assert played(act).bursts == [16, 32]


def test_who_is_gone_keeps_nobody_up():
    async def act(pair):
        gone = pair.me._world.join(Identity.ephemeral(), link=LONG)
        pair.me._world.kill(gone.me)
        pair.warm_up.plan(pair.group(10_000_000, other=gone))
        pair.warm_up.expect(1.0)
        await asyncio.sleep(20)
        assert not pair.warm_up._tasks

    assert played(act).bursts == []


def test_the_other_side_answers_each_burst_and_no_more_than_it_must():
    async def act(pair):
        served = WarmUp(pair.other, Timeouts())
        await pair.other.serve(WARM_UP, served.serve)
        stream = await pair.me.open(pair.other.me, WARM_UP)
        answers = 0
        while answers < 10 and await _is_answered(stream):
            answers += 1
        assert answers == 2

    played(act)


async def _is_answered(stream: Stream) -> bool:
    try:
        await send(stream, bytes(256 * KIB), 5.0)
        return await receive(stream, 1, 5.0) == b"g"
    except NetworkError:
        return False


def test_a_node_warms_up_with_its_last_group():
    async def play() -> list[int]:
        peers = await Peers(
            "ann", "bob", "cat", size=600_000, link=LONG, timeouts=Timeouts()
        ).start()
        results = await peers.average_all()
        came = dict.fromkeys(peers.nodes, 0)
        for name, node in peers.nodes.items():

            async def count(stream: Stream, name: str = name) -> None:
                while True:
                    size = len(await receive(stream, 1 << 20, 5.0))
                    came[name] += size
                    await send(stream, b"g", 5.0)

            await node._streams.serve(WARM_UP, count)
            await node.hold(Anchor(1, "b" * 64), peers.base, peers.base.size)
            node.expect_end(5.0)
        assert all(isinstance(result, Averaged) for result in results)
        await asyncio.sleep(6)
        return list(came.values())

    # From both others: an eighth of 400 000 values as fp16 would be 100 KB.
    assert virtual_time.run(play()) == [2 * (16 + 32) * KIB] * 3


@pytest.mark.parametrize("overlap", [False, True])
def test_a_trainer_foretells_the_end_of_its_local_epoch(tmp_path, monkeypatch, overlap):
    told: dict[str, list[float]] = {}
    monkeypatch.setattr(
        Swarm, "expect_end", lambda swarm, left: told.setdefault(swarm.me, []).append(left)
    )
    churn = Churn(tmp_path, rounds=1, min_peers=2, overlap=overlap)
    churn.local_epoch = (4, 0.1)
    churn.play("ann", "bob")
    assert len(told) == (0 if overlap else 2)  # with overlap nobody waits for the lines
    for left in told.values():
        assert len(left) == 3
        assert sorted(left, reverse=True) == left
        assert 0.25 < left[0] < 0.6
