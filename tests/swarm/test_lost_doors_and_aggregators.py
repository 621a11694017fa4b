"""A run survives its bootstrap peer and its aggregator; and it survives in its aggregator. By real
processes that are killed and started again."""

import pytest

from tests.swarm.peer import LOADED
from tests.swarm.processes import free_port

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(400)]

# Local epochs of a second leave time to act in the middle of one.
UNHURRIED = ("training.local.seconds=1", "averaging.min_peers=2")


def at_least(number: float):
    return lambda value: value >= number


def test_the_run_goes_on_without_its_bootstrap_peer_which_comes_back_as_the_same(processes):
    door = processes.bootstrap("rounds=1000", *UNHURRIED, port=free_port())
    address, opened = door.address, door.wait_for("opened")
    ann, bob = processes.trainers("ann bob", address)
    ann.wait_for("step_done", LOADED, round=1)
    door.kill()
    before = ann.wait_for("round_committed", round=at_least(2))["round"]
    door = processes.again(door)
    again = door.wait_for("opened", LOADED)
    assert (again["run"], again["addresses"]) == (opened["run"], opened["addresses"])
    cat = processes.trainer("cat", address)
    caught_up = cat.wait_for("caught_up", LOADED)
    assert caught_up["round"] > before
    joined = cat.wait_for("round_committed", peers=lambda names: len(names) == 3)
    for other in (ann, bob):
        row = other.wait_for("round_committed", round=joined["round"])
        assert row["digest"] == joined["digest"]


def test_a_newcomer_joins_through_a_trainer_when_the_bootstrap_peer_is_gone_for_good(processes):
    door = processes.bootstrap("rounds=5", *UNHURRIED)
    host = f"/ip4/127.0.0.1/tcp/{free_port()}"
    ann = processes.trainer("ann", door.address, "--host-maddrs", host)
    bob = processes.trainer("bob", door.address)
    bob.wait_for("step_done", LOADED, round=3)
    door.kill()
    bob.kill()
    cat = processes.trainer("cat", f"{host}/p2p/{ann.events('joined')[0]['peer_id']}")
    assert cat.finish()["digest"] == ann.finish()["digest"]
    assert cat.events("caught_up")[0]["round"] >= 3


def test_a_restarted_aggregator_goes_on_from_its_checkpoint(processes):
    door = processes.bootstrap("rounds=5", *UNHURRIED)
    judge = processes.aggregator(door.address)
    ann, bob = processes.trainers("ann bob", door.address)
    saved = judge.wait_for("checkpoint_saved", LOADED, round=at_least(2))["round"]
    judge.kill()
    judge = processes.again(judge)
    final = judge.finish()["digest"]
    assert {ann.finish()["digest"], bob.finish()["digest"]} == {final}
    rounds = [row["round"] for row in judge.rows if row["event"] == "evaluated"]
    assert rounds[-1] == 5
    assert sorted(set(rounds)) == rounds  # none twice
    assert set(range(saved + 1)) <= set(rounds)
    [last] = judge.events("evaluated", round=5)
    assert last["digest"] == final


def test_new_trainers_go_on_from_the_aggregator_when_all_trainers_are_gone(processes):
    door = processes.bootstrap("rounds=5", *UNHURRIED)
    judge = processes.aggregator(door.address)
    lost = processes.trainers("ann bob", door.address)
    saved = judge.wait_for("checkpoint_saved", LOADED, round=at_least(2))["round"]
    for trainer in lost:
        trainer.kill()
    new = processes.trainers("cat dan", door.address)
    digests = {peer.finish()["digest"] for peer in (*new, judge)}
    assert len(digests) == 1
    for trainer in new:
        assert trainer.events("caught_up")[0]["round"] >= saved


def test_new_trainers_go_on_from_the_checkpoint_of_a_restarted_aggregator(processes):
    door = processes.bootstrap("rounds=5", "training.local.seconds=1")
    judge = processes.aggregator(door.address)
    ann = processes.trainer("ann", door.address)
    saved = judge.wait_for("checkpoint_saved", LOADED, round=at_least(2))["round"]
    ann.kill()
    judge.kill()
    judge = processes.again(judge)
    bob = processes.trainer("bob", door.address)
    assert bob.finish()["digest"] == judge.finish()["digest"]
    assert bob.events("caught_up")[0]["round"] >= saved
