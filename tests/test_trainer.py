"""The trainer's whole life, over the in-memory swarm, with scripted failures."""

import time

import numpy as np
import pytest

from p2pllm.events import CaughtUp, RoundCommitted, ShardClaimed, StepDone
from p2pllm.roles import trainer
from p2pllm.roles.local_work import Offer
from p2pllm.swarm.records import Progress
from p2pllm.swarm.rounds import Anchor, SwarmView
from tests.churn import SIZE, Churn


@pytest.fixture(autouse=True)
def _lively(monkeypatch):
    """Peers look around more often than in real life."""
    monkeypatch.setattr(trainer, "_LOOK", 0.05)
    monkeypatch.setattr(trainer, "_PAUSE", 0.1)


def test_three_trainers_end_with_the_same_adapter(tmp_path):
    peers = Churn(tmp_path, rounds=3, min_peers=3).play("ann", "bob", "cat")
    assert len({peer.final.digest for peer in peers.values()}) == 1
    assert all(peer.final.round == 3 for peer in peers.values())
    shards = [peer.of(ShardClaimed)[0].shard for peer in peers.values()]
    assert len(set(shards)) == 3


def test_survivors_finish_when_one_peer_crashes(tmp_path):
    churn = Churn(tmp_path, rounds=4, min_peers=2).crash("cat", at_round=2)
    peers = churn.play("ann", "bob", "cat")
    assert peers["ann"].final.digest == peers["bob"].final.digest
    last = peers["ann"].of(RoundCommitted)[-1]
    assert sorted(last.peers) == ["ann", "bob"]


@pytest.mark.parametrize("outer", ["mean", "nesterov"])
def test_a_late_joiner_catches_up_and_ends_like_the_others(tmp_path, outer):
    churn = Churn(tmp_path, rounds=6, min_peers=2, outer=outer)
    for round in range(6):
        churn.slow("ann", round, 0.2)
    churn.start("ann", "bob")
    while not churn.peers["ann"].of(RoundCommitted)[1:]:
        time.sleep(0.02)
    peers = churn.play("eve")
    assert len({peer.final.digest for peer in peers.values()}) == 1
    assert peers["eve"].of(CaughtUp)[0].round >= 2


def test_a_slow_peer_misses_a_round_and_its_work_is_carried_into_the_next(tmp_path):
    churn = Churn(tmp_path, rounds=4, min_peers=2).slow("cat", at_round=1, seconds=2.0)
    churn.slow("ann", 0, 0.3)  # nobody is left behind at the start
    for round in (2, 3):
        churn.slow("ann", round, 1.0)
    peers = churn.play("ann", "bob", "cat")
    assert len({peer.final.digest for peer in peers.values()}) == 1
    left_out = [e.left_out for e in peers["ann"].of(RoundCommitted)]
    assert any("cat" in names for names in left_out)
    assert peers["cat"].of(CaughtUp)


@pytest.mark.parametrize("overlap", [False, True])
def test_who_joins_in_the_midst_of_a_local_epoch_is_in_its_round(tmp_path, overlap):
    churn = Churn(tmp_path, rounds=5, min_peers=2, overlap=overlap)
    churn.local_epoch = (20, 0.1)  # the others wait for half a second
    churn.start("ann", "bob")
    churn.wait_for("ann", lambda peer: peer.of(RoundCommitted)[1:])
    time.sleep(1.0)
    eve = churn.play("eve")["eve"]
    assert [e.round for e in eve.of(RoundCommitted)] == [2, 3, 4]
    assert eve.of(RoundCommitted)[0].samples < 4 * 18
    assert len(eve.of(CaughtUp)) == 1


def test_a_slow_trainer_offers_what_it_has_when_the_others_have_waited(tmp_path):
    churn = Churn(tmp_path, rounds=3, min_peers=2)
    churn.local_epoch = (10, 0.05)
    churn.start("ann", "bob")
    churn.local_epoch = (60, 0.05)
    peers = churn.play("cat")
    assert [e.round for e in peers["cat"].of(RoundCommitted)] == [0, 1, 2]
    # In the first round, nobody knows how long a round takes: they wait for a whole second.
    assert all(4 * 10 < e.samples < 4 * 60 for e in peers["cat"].of(RoundCommitted))
    assert all(not e.left_out for e in peers["ann"].of(RoundCommitted))


@pytest.mark.parametrize("rule", ["freeze_a", "alternate"])
@pytest.mark.parametrize(
    "averaging", [{}, {"compression": "int8", "outer": "nesterov"}, {"overlap": True}]
)
def test_all_agree_when_only_a_half_is_averaged_in_a_round(tmp_path, rule, averaging):
    churn = Churn(tmp_path, rounds=4, min_peers=3, lora=rule, **averaging)
    peers = churn.play("ann", "bob", "cat")
    assert len({peer.final.digest for peer in peers.values()}) == 1
    values = peers["ann"].learner.values()
    first, rest = values[: SIZE // 3], values[SIZE // 3 :]
    assert (first != 0).all() == (rule == "alternate")
    assert (rest != 0).all()
    if not averaging:  # the mean of the three peers' steps, in each round that trains this half
        np.testing.assert_allclose(rest, 2e-3 * (4 if rule == "freeze_a" else 2), rtol=1e-3)


def test_only_the_half_that_is_averaged_travels(tmp_path):
    sent = {}
    for rule in ("both", "alternate"):
        churn = Churn(tmp_path / rule, rounds=2, min_peers=2, compression="none", lora=rule)
        rounds = churn.play("ann", "bob")["ann"].of(RoundCommitted)
        sent[rule] = [committed.bytes_sent for committed in rounds]
    overhead = 500  # framing
    wire = 4 * SIZE  # half of the delta to the other, half of the average back
    assert sent["both"] == pytest.approx([wire, wire], abs=overhead)
    assert sent["alternate"] == pytest.approx([wire * 2 / 3, wire / 3], abs=overhead)


def test_carried_work_waits_for_a_round_of_the_same_half(tmp_path):
    churn = Churn(tmp_path, rounds=6, min_peers=2, lora="alternate")
    churn.slow("cat", at_round=1, seconds=2.0)
    for round in (2, 3, 4):
        churn.slow("ann", round, 1.0)
    peers = churn.play("ann", "bob", "cat")
    assert len({peer.final.digest for peer in peers.values()}) == 1
    assert peers["cat"].of(CaughtUp)
    assert peers["cat"].life._work._carried is None  # it was of use in round 3 or 5


def test_carried_work_counts_with_a_discount():
    part = slice(4, 6)
    fresh = Offer(np.full(2, 1.0, np.float32), 10.0, part)
    missed = Offer(np.full(2, 3.0, np.float32), 20.0, part)
    both = fresh.joined_with(missed, discount=0.5)
    assert both.samples == 20.0
    np.testing.assert_allclose(both.delta, 2.0)
    alone = fresh.joined_with(missed, discount=0.0)
    assert alone.samples == 10.0
    np.testing.assert_allclose(alone.delta, 1.0)


@pytest.mark.parametrize("overlap", [False, True])
def test_with_and_without_overlap_every_step_counts_once(tmp_path, overlap):
    churn = Churn(tmp_path, rounds=4, min_peers=3, overlap=overlap, compression="none")
    churn.local_epoch = (10, 0.02)
    peers = churn.play("ann", "bob", "cat")
    assert len({peer.final.digest for peer in peers.values()}) == 1
    for peer in peers.values():
        assert sorted(peer.learner.done) == [r for r in range(4) for _ in range(10)]
        # Each round, the mean of what a local epoch of ann's, bob's and cat's adds.
        np.testing.assert_allclose(peer.learner.values(), 4 * (1 + 2 + 3) / 3 * 1e-3, rtol=1e-5)


def test_with_overlap_nobody_waits_for_the_others(tmp_path):
    churn = Churn(tmp_path, rounds=3, min_peers=2, overlap=True).slow(
        "bob", at_round=0, seconds=0.4
    )
    churn.local_epoch = (20, 0.01)
    peers = churn.play("ann", "bob")
    first = peers["ann"].of(RoundCommitted)[0]
    before = [e for e in peers["ann"].of(StepDone) if e.time < first.time]
    assert {e.round for e in before} == {0, 1}  # it was in the next local epoch when bob was ready
    assert peers["ann"].final.digest == peers["bob"].final.digest


def test_work_done_ahead_is_not_lost_when_its_round_is_missed(tmp_path):
    churn = Churn(tmp_path, rounds=5, min_peers=2, overlap=True)
    churn.local_epoch = (10, 0.01)
    for round in (1, 2):
        churn.slow("cat", at_round=round, seconds=2.0)
    for round in (2, 3):
        churn.slow("ann", at_round=round, seconds=1.0)
    peers = churn.play("ann", "bob", "cat")
    assert len({peer.final.digest for peer in peers.values()}) == 1
    assert peers["cat"].of(CaughtUp)


def test_a_finished_trainer_is_there_until_the_others_say_that_they_have_finished():
    final = Anchor(4, "f" * 64)

    def peer(**said):
        record = Progress(peer="12D3KooWdan", name="dan", role="trainer", state="training", round=4)
        return record.model_copy(update={"digest": final.digest, **said})

    def needs(*peers):
        return trainer._still_needs(final, SwarmView("12D3KooWann", peers))

    assert needs(peer())  # presumed, or saving: in the last group, over a slow line
    assert needs(peer(state="finished"), peer(state="ready", round=3, digest="e" * 64))
    assert needs(peer(role="aggregator", state="joining", round=0, digest=""))
    assert not needs(peer(state="finished"), peer(state="leaving"), peer(state="joining", round=0))
    assert not needs(peer(role="aggregator"))
