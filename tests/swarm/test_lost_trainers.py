"""A run survives its trainers: killed, leaving, late, and back again. By real processes.

Where somebody has to come in a certain round, the quorum holds the run there: others are away.
"""

import pytest

from p2pllm.journal import Row
from tests.swarm.peer import LOADED

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(400)]

# Local epochs of a second leave time to act in the middle of one.
UNHURRIED = ("training.local.seconds=1", "averaging.min_peers=2")


def test_survivors_finish_when_a_trainer_is_killed_in_its_local_epoch(processes):
    door = processes.bootstrap("rounds=4", *UNHURRIED)
    ann, bob, cat = processes.trainers("ann bob cat", door.address)
    cat.wait_for("step_done", LOADED, round=1)
    cat.kill()
    assert ann.finish()["digest"] == bob.finish()["digest"]
    for survivor in (ann, bob):
        assert "cat" in lost_in(survivor.ledger)


def test_a_newcomer_and_a_restarted_trainer_end_with_the_adapter_of_the_others(processes):
    door = processes.bootstrap("rounds=5", *UNHURRIED, "averaging.min_peers=3")
    ann, bob, cat = processes.trainers("ann bob cat", door.address)
    bob.wait_for("step_done", LOADED, round=3)
    bob.kill()
    cat.kill()
    bob, dan = processes.again(bob), processes.trainer("dan", door.address)
    digests = [peer.finish()["digest"] for peer in (ann, bob, dan)]
    assert len(set(digests)) == 1
    for late in (bob, dan):
        assert late.events("caught_up")[0]["round"] >= 3
        assert late.events("round_committed")
    [before, after] = [row["peer_id"] for row in bob.rows if row["event"] == "joined"]
    assert before == after


def test_nobody_waits_for_a_trainer_that_leaves_with_ctrl_c(processes):
    door = processes.bootstrap("rounds=4", "averaging.deadline.floor=15", *UNHURRIED)
    ann, bob, cat = processes.trainers("ann bob cat", door.address)
    cat.wait_for("step_done", LOADED, round=1)
    cat.interrupt()
    assert cat.end(10) == 0
    assert ann.finish()["digest"] == bob.finish()["digest"]
    for stayed in (ann, bob):
        waits = [row["seconds_waiting"] for row in stayed.events("round_committed")]
        assert max(waits[1:]) < 10, waits


def lost_in(ledger: list[Row]) -> set[str]:
    """Who was missing from a round, in the ledger's words."""
    return {name for row in ledger for name in (*row.get("left_out", {}), *row.get("culprits", []))}
