"""Every row is trained exactly as often as planned, whoever dies, is late or comes back.

The adapter itself is the witness: it has one value for each row, see `WitnessLearner`.
"""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from p2pllm.coverage import Span, covered, is_open, merged, shared_shards
from p2pllm.data.rows import LeasedRows, ShardedRows
from p2pllm.data.tokens import Row
from p2pllm.events import RoundCommitted, ShardClaimed, Trouble
from p2pllm.roles import leases, trainer
from p2pllm.roles.trainer import Trainer
from p2pllm.swarm.rounds import free_shard
from tests.churn import Churn
from tests.counting import WitnessLearner

ROWS, SHARDS = 48, 6  # eight rows in a shard
NUMBERED = [Row((number,), (number,)) for number in range(ROWS)]


@pytest.fixture(autouse=True)
def _lively(monkeypatch):
    """Peers look around more often than in real life."""
    monkeypatch.setattr(trainer, "_LOOK", 0.05)
    monkeypatch.setattr(trainer, "_PAUSE", 0.1)


@pytest.fixture
def commits(monkeypatch):
    """Every average that any peer committed, by the digest that it led to."""
    seen = {}
    commit = Trainer._commit

    def watched(self, outcome, offer, state):
        digest, before = self._anchor.digest, self._state
        commit(self, outcome, offer, state)
        delta = self._state - before
        seen[self._anchor.digest] = (digest, delta, outcome.group, self._rows.coverage)

    monkeypatch.setattr(Trainer, "_commit", watched)
    return seen


def lineage(commits, final):
    """The averages that led to this adapter, the last one first."""
    while final in commits:
        yield commits[final]
        final = commits[final][0]


class RowsChurn(Churn):
    """Peers that train on `batch` rows in a local epoch."""

    def __init__(self, folder, rounds, batch, shards=SHARDS, **averaging):
        plain = {"compression": "none", "robust": "none", **averaging}
        self.shards, self.batch = shards, batch
        super().__init__(folder, rounds, **plain)

    def learner(self, step, before_training):
        return WitnessLearner(ROWS, self.batch, before_training)


def is_gone(name, peer):
    """Whether this peer's record, and so its lease, has expired."""
    return name in peer.swarm.view().names.values() and name not in {
        p.name for p in peer.swarm.view().peers
    }


def times_trained(commits, final):
    """How often each row is in the adapter, (ROWS,): all work weighs the same in these runs."""
    counts = np.zeros(ROWS, int)
    for _, delta, group, _ in lineage(commits, final):
        times = delta * len(group.members)
        assert np.abs(times - times.round()).max() < 1e-3
        counts += times.round().astype(int)
    return counts


def times_planned(coverage, shards=SHARDS):
    """The same, as the coverage has it."""
    parts = ShardedRows(NUMBERED, shards, seed=1)
    counts = np.zeros(ROWS, int)
    for shard, end in enumerate(coverage):
        for position in range(end):
            counts[next(parts.read(shard, position)).input_ids[0]] += 1
    return counts


# ---- under churn


def test_under_churn_each_row_is_trained_exactly_the_planned_number_of_times(tmp_path, commits):
    # Three trainers in every round (a quorum of three), four rows each: eight rounds, two passes.
    churn = RowsChurn(tmp_path, rounds=8, batch=4, min_peers=3).crash("cat", at_round=3)
    churn.crash("dan", at_round=5).start("ann", "bob", "cat")
    churn.wait_for("ann", lambda ann: is_gone("cat", ann))
    churn.start("dan")  # comes late, for the one that died
    churn.wait_for("dan", lambda dan: dan._stop.is_set())
    churn.wait_for("ann", lambda ann: is_gone("dan", ann))
    peers = churn.play("eve")
    finals = {peers[name].final.digest for name in ("ann", "bob", "eve")}
    assert len(finals) == 1
    counts = times_trained(commits, finals.pop())
    assert Counter(counts.tolist()) == {2: ROWS}


@pytest.mark.parametrize("overlap", [False, True])
def test_whatever_happens_the_coverage_says_what_was_trained(tmp_path, commits, overlap):
    churn = RowsChurn(tmp_path, rounds=9, batch=5, min_peers=2, carry=0.0, overlap=overlap)
    churn.crash("cat", at_round=2).slow("dan", at_round=1, seconds=2.0)
    for round in range(3, 9):
        churn.slow("ann", round, 0.2)
    churn.start("ann", "bob", "cat", "dan")
    churn.wait_for("bob", lambda bob: len(bob.of(RoundCommitted)) > 3)
    peers = churn.play("eve")
    finals = {peers[name].final.digest for name in ("ann", "bob", "dan", "eve")}
    assert len(finals) == 1
    final = finals.pop()
    counts, coverage = times_trained(commits, final), commits[final][3]
    assert counts.tolist() == times_planned(coverage).tolist()
    assert sum(coverage) == counts.sum() >= 9 * 2 * 5


def test_the_rows_of_one_that_died_go_on_where_the_last_commit_left_them(tmp_path, commits):
    churn = RowsChurn(tmp_path, rounds=12, batch=3, shards=2).crash("bob", at_round=2)
    for round in range(2, 12):
        churn.slow("ann", round, 0.5)
    churn.start("ann", "bob")
    churn.wait_for("ann", lambda ann: is_gone("bob", ann))
    peers = churn.play("cat")
    lost = peers["bob"].of(ShardClaimed)[0].shard
    assert peers["cat"].of(ShardClaimed)[0].shard == lost
    spans = [
        span
        for _, _, group, _ in reversed(list(lineage(commits, peers["ann"].final.digest)))
        for member in group.members
        for span in member.spans
        if span.shard == lost
    ]
    assert all(one.end == other.begin for one, other in pairwise(spans))
    assert spans[0] == Span(lost, 0, 3)
    assert spans[-1].end >= 9


def test_carried_work_counts_once(tmp_path, commits):
    churn = RowsChurn(tmp_path, rounds=4, batch=2, min_peers=2).slow("cat", 1, seconds=2.0)
    churn.slow("ann", 0, seconds=0.5)  # so that all are there from the beginning
    for round in (2, 3):
        churn.slow("ann", round, 1.0)
    peers = churn.play("ann", "bob", "cat")
    [final] = {peer.final.digest for peer in peers.values()}
    trained, spans = np.zeros(ROWS, int), []
    for _, delta, group, _ in lineage(commits, final):
        trained += delta != 0  # carried work weighs less
        spans += [span for member in group.members for span in member.spans]
    assert trained.tolist() == times_planned(commits[final][3]).tolist()
    assert any(span.end - span.begin > 2 for span in spans), "nothing was carried"


# ---- two on one shard


def test_two_on_one_shard_sort_it_out_before_they_average(tmp_path, commits, monkeypatch):
    calls: Counter[str] = Counter()

    def crossing(view, reached):
        calls[view.me] += 1
        return 0 if calls[view.me] == 1 else free_shard(view, reached)

    monkeypatch.setattr(leases, "free_shard", crossing)
    peers = RowsChurn(tmp_path, rounds=4, batch=4, min_peers=2).play("ann", "bob")
    assert len({peer.final.digest for peer in peers.values()}) == 1
    counts = times_trained(commits, peers["ann"].final.digest)
    assert counts.sum() == 4 * 2 * 4
    assert counts.max() == 1


def test_rows_count_once_even_where_two_never_see_each_other_s_lease(
    tmp_path, commits, monkeypatch
):
    # As if each never saw the other's lease.
    monkeypatch.setattr(leases, "lost_shards", lambda leased, view: set())
    monkeypatch.setattr(leases, "free_shard", lambda view, reached: reached.index(min(reached)))
    churn = RowsChurn(tmp_path, rounds=4, batch=4, min_peers=1, carry=0.0)
    peers = churn.play("ann", "bob")
    finals = {peer.final.digest for peer in peers.values()}
    assert len(finals) == 1
    final = finals.pop()
    counts, coverage = times_trained(commits, final), commits[final][3]
    assert counts.tolist() == times_planned(coverage).tolist()
    assert counts.max() == 1


def test_more_trainers_than_shards_are_a_letter_and_the_spare_takes_over(tmp_path, commits):
    churn = RowsChurn(tmp_path, rounds=8, batch=4, shards=2, min_peers=2).crash("bob", at_round=3)
    for round in range(3):
        churn.slow("ann", round, 0.3)
    churn.start("ann", "bob")
    churn.wait_for("bob", lambda bob: bob.of(RoundCommitted))
    churn.start("cat")
    churn.wait_for("cat", lambda cat: cat.of(Trouble))
    letter = churn.peers["cat"].of(Trouble)[0].what
    assert "All 2 parts" in letter
    assert "data.shards" in letter
    assert "--data FILE" in letter
    peers = churn.play()
    assert peers["cat"].final.digest == peers["ann"].final.digest
    assert peers["cat"].of(ShardClaimed)[0].shard == peers["bob"].of(ShardClaimed)[0].shard
    counts = times_trained(commits, peers["ann"].final.digest)
    assert counts.tolist() == times_planned(commits[peers["ann"].final.digest][3], 2).tolist()


# ---- the parts


def test_spans_of_one_shard_are_joined():
    spans = [Span(3, 4, 8), Span(1, 0, 2), Span(3, 8, 9)]
    assert merged(spans) == (Span(1, 0, 2), Span(3, 4, 9))


def test_coverage_grows_by_what_was_committed():
    assert covered((0, 4), [Span(1, 4, 9), Span(0, 0, 2), Span(7, 0, 5)]) == (2, 9)


def test_work_is_open_until_it_or_the_same_rows_of_another_are_committed():
    mine = [Span(0, 4, 8), Span(0, 8, 12)]
    assert is_open(mine, (4, 0))
    assert not is_open(mine, (12, 0))
    assert not is_open(mine, (6, 0))


def test_two_share_a_shard_even_where_their_rows_differ():
    assert shared_shards([Span(1, 0, 5)], [Span(1, 5, 9), Span(2, 0, 1)]) == {1}


def leased(order):
    """A source that is given these shards, one after the other."""
    return LeasedRows(ShardedRows(NUMBERED, SHARDS, seed=1), iter(order).__next__)


def test_a_local_epoch_may_end_one_shard_and_begin_another():
    rows = leased([2, 4])
    batch = rows.next_batch(12)
    assert len({row.input_ids for row in batch}) == 12
    assert rows.leases == (2, 4)
    assert rows.take() == (Span(2, 0, 8), Span(4, 0, 4))
    rows.settle((0, 0, 8, 0, 4, 0))
    assert rows.leases == (4,)


def test_rows_that_were_not_committed_come_again():
    rows = leased([0, 0])
    first = rows.next_batch(3)
    assert rows.take() == (Span(0, 0, 3),)
    rows.settle((0,) * SHARDS)
    assert rows.next_batch(3) == first


def test_open_work_does_not_come_again():
    rows = leased([0])
    first = rows.next_batch(3)
    rows.settle((0,) * SHARDS, rows.take())
    assert first[0] not in rows.next_batch(5)
    assert rows.reached[0] == 8


def test_work_done_ahead_on_rows_that_another_committed_is_forgotten():
    rows = leased([0, 1, 1])
    rows.next_batch(4)
    offered = rows.take()
    first = rows.next_batch(6)  # ahead: the rest of shard 0, and two rows of shard 1
    ours, theirs = covered((0,) * SHARDS, offered), Span(1, 0, 5)
    assert not rows.settle(covered(ours, [theirs]))
    assert rows.take() == ()
    assert rows.next_batch(1)[0] not in first
    assert rows.take() == (Span(1, 5, 6),)


def test_work_done_ahead_stays_when_the_rest_is_committed():
    rows = leased([0, 1])
    rows.next_batch(4)
    offered = rows.take()
    rows.next_batch(6)
    assert rows.settle(covered((0,) * SHARDS, offered))
    assert rows.take() == (Span(0, 4, 8), Span(1, 0, 2))


def test_each_pass_over_a_shard_has_an_order_that_everybody_knows():
    parts = ShardedRows(NUMBERED, SHARDS, seed=1)
    first, second = list(parts.read(0, 0)), list(parts.read(0, 8))
    assert first != second
    assert sorted(r.input_ids for r in first) == sorted(r.input_ids for r in second)
    assert list(ShardedRows(NUMBERED, SHARDS, seed=1).read(0, 11)) == second[3:]
