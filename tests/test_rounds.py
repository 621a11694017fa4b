"""The pure decisions: what to do next, whom to follow, whom to wait for."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from p2pllm.config.run import Deadline
from p2pllm.swarm.identity import Identity
from p2pllm.swarm.records import Progress, Result
from p2pllm.swarm.rounds import (
    Anchor,
    Average,
    CatchUp,
    Finish,
    Standing,
    Start,
    SwarmView,
    Train,
    agreed_anchor,
    coverage_of,
    donors_of,
    expected_in,
    free_shard,
    leader_of,
    learned_deadline,
    lost_shards,
    next_action,
)


def peer(name, round=0, digest="a", role="trainer", state="training", **more):
    return Progress(
        peer=name, name=name, role=role, state=state, round=round, digest=digest, **more
    )


def view(*peers, aggregator=None):
    return SwarmView("me", peers, aggregator)


def at(round, digest="a", has_trained=False):
    return Standing(Anchor(round, digest), has_trained)


def test_a_peer_alone_at_round_0_simply_starts():
    assert next_action(Standing(None), view(), 5) == Start()


def test_a_newcomer_never_begins_a_run_again_that_has_results():
    last = Result(round=3, digest="c", loss=3.0, rows=8)
    seen = SwarmView("me", (), "agg", (last,))
    assert next_action(Standing(None), seen, 5) == CatchUp(Anchor(3, "c"), ())


def test_a_newcomer_catches_up_before_it_does_anything_else():
    action = next_action(Standing(None), view(peer("ann", 3), peer("bob", 3)), 5)
    assert isinstance(action, CatchUp)
    assert action.anchor == Anchor(3, "a")
    assert set(action.donors) == {"ann", "bob"}


def test_a_peer_trains_then_averages():
    others = view(peer("ann", 2))
    assert next_action(at(2), others, 5) == Train()
    assert next_action(at(2, has_trained=True), others, 5) == Average()


def test_a_peer_that_missed_the_last_round_catches_up_before_it_finishes():
    others = view(peer("ann", 5, "b"), peer("bob", 5, "b"))
    assert isinstance(next_action(at(5, "a"), others, 5), CatchUp)
    assert isinstance(next_action(at(4, has_trained=True), others, 5), CatchUp)


def test_all_rounds_done_is_the_end():
    assert next_action(at(5), view(peer("ann", 5)), 5) == Finish()


def test_the_minority_heals_itself_from_the_majority():
    others = view(peer("ann", 3, "x"), peer("bob", 3, "x"))
    action = next_action(at(3, "y"), others, 9)
    assert isinstance(action, CatchUp)
    assert action.anchor.digest == "x"


def test_a_tie_is_decided_alike_on_both_sides():
    mine = agreed_anchor(Anchor(3, "x"), view(peer("ann", 3, "y")))
    theirs = agreed_anchor(Anchor(3, "y"), view(peer("ann", 3, "x")))
    assert mine == theirs


def test_one_liar_far_ahead_drags_nobody_along():
    others = view(peer("ann", 3), peer("bob", 3), peer("liar", 1000, "z"))
    assert next_action(at(3), others, 2000) == Train()


def test_two_trainers_where_one_committed_alone_go_on_from_it():
    assert next_action(at(3, has_trained=True), view(peer("ann", 4, "b")), 9) == CatchUp(
        Anchor(4, "b"), ("ann",)
    )


def test_who_went_on_alone_while_it_was_cut_off_comes_back_to_the_others():
    others = view(peer("ann", 3), peer("bob", 3))
    assert next_action(at(6, "z"), others, 9) == CatchUp(Anchor(3, "a"), ("ann", "bob"))
    seen_by_ann = view(peer("bob", 3), peer("me", 6, "z"))
    assert next_action(at(3), seen_by_ann, 9) == Train()


def test_who_is_the_first_to_commit_goes_on_and_the_others_need_a_second_word():
    assert next_action(at(4, "b"), view(peer("ann", 3), peer("bob", 3)), 9) == Train()
    one = view(peer("ann", 4, "b"), peer("bob", 3))
    assert next_action(at(3, has_trained=True), one, 9) == Average()
    two = view(peer("ann", 4, "b"), peer("bob", 4, "b"))
    assert isinstance(next_action(at(3, has_trained=True), two, 9), CatchUp)


rounds_held = st.lists(st.tuples(st.integers(0, 4), st.sampled_from("ab")), min_size=2, max_size=7)


@given(rounds_held)
def test_following_the_agreed_adapter_brings_everybody_together(held):
    anchors = [Anchor(*a) for a in held]
    for _ in range(2 * len(anchors)):
        for at in range(len(anchors)):
            others = [peer(str(i), a.round, a.digest) for i, a in enumerate(anchors) if i != at]
            anchors[at] = agreed_anchor(anchors[at], view(*others)) or anchors[at]
    assert 2 * max(Counter(anchors).values()) >= len(anchors)  # the rest waits a step ahead
    assert max(a.round for a in anchors) - min(a.round for a in anchors) <= 1


def test_fresh_trainers_go_on_from_the_designated_aggregator():
    kept = peer("agg", 7, "k", role="aggregator", state="following")
    for standing in (Standing(None), at(0), at(1, "b", has_trained=True)):
        action = next_action(standing, view(peer("ann", 0), kept, aggregator="agg"), 9)
        assert action == CatchUp(Anchor(7, "k"), ("agg",))


def test_an_aggregator_that_the_owner_did_not_name_counts_for_nothing():
    impostor = peer("imp", 7, "k", role="aggregator", state="following")
    assert next_action(at(0), view(peer("ann", 0), impostor, aggregator="agg"), 9) == Train()


def test_donors_are_those_that_can_be_dialled_trainers_first():
    others = view(
        peer("agg", 2, role="aggregator"),
        peer("ann", 2),
        peer("nat", 2, dialable=False),
        peer("old", 1),
        peer("boot", 2, role="bootstrap"),
    )
    assert donors_of(Anchor(2, "a"), others) == ("ann", "agg")


def test_who_is_still_loading_is_waited_for_in_round_0_only():
    others = view(peer("ann", 0), peer("new", 0, "", state="joining"))
    assert expected_in(Anchor(0, "a"), others) == {"ann", "new"}
    others = view(peer("ann", 1), peer("new", 0, "", state="joining"))
    assert expected_in(Anchor(1, "a"), others) == {"ann"}


def test_who_leaves_is_not_waited_for():
    assert expected_in(Anchor(1, "a"), view(peer("ann", 1, state="leaving"))) == set()


names = st.lists(st.text("abcdefgh", min_size=1, max_size=4), min_size=2, max_size=8, unique=True)


@given(names)
def test_everybody_computes_the_same_leader(everyone):
    anchor = Anchor(1, "a")
    leaders = {
        leader_of(
            anchor, SwarmView(me, tuple(peer(n, 1) for n in everyone if n != me)), (), dialable=True
        )
        for me in everyone
    }
    assert len(leaders) == 1


def test_a_suspect_and_a_peer_that_cannot_be_dialled_never_lead():
    others = view(peer("ann", 1), peer("bob", 1, dialable=False))
    assert leader_of(Anchor(1, "a"), others, ["ann"], dialable=False) == "me"


@given(st.lists(st.floats(0, 1e6), max_size=40))
def test_the_deadline_stays_between_floor_and_ceiling(history):
    rules = Deadline(floor=2, ceiling=50)
    assert 2 <= learned_deadline(history, rules) <= 50


def test_the_deadline_learns_from_past_rounds():
    rules = Deadline(mads=4, floor=1, ceiling=600)
    assert learned_deadline([], rules) == 600
    assert learned_deadline([20.0, 22.0, 21.0], rules) == 25.0


@given(st.integers(1, 8), st.data())
def test_the_shard_to_lease_is_the_least_trained_of_those_that_are_free(shards, data):
    taken = data.draw(st.sets(st.integers(0, shards - 1)))
    reached = data.draw(st.lists(st.integers(0, 3), min_size=shards, max_size=shards))
    others = view(*(peer(f"p{s}", 1, shards=(s,)) for s in taken))
    shard = free_shard(others, reached)
    if len(taken) == shards:
        assert shard is None
    else:
        assert shard not in taken
        assert reached[shard] == min(n for s, n in enumerate(reached) if s not in taken)


def test_peers_that_come_together_mostly_lease_different_shards():
    leased = [free_shard(SwarmView(f"peer {i}"), [0] * 64) for i in range(8)]
    assert len(set(leased)) >= 6


def test_of_two_that_claimed_the_same_shard_exactly_one_keeps_it():
    for one, other in (("ann", "bob"), ("bob", "ann")):
        ours = lost_shards([3, 5], SwarmView(one, (peer(other, 1, shards=(3,)),)))
        theirs = lost_shards([3], SwarmView(other, (peer(one, 1, shards=(3, 5)),)))
        assert sorted([*ours, *theirs]) == [3]


def test_the_coverage_is_what_most_holders_of_an_adapter_say():
    others = view(
        peer("ann", 2, coverage=(4, 8)),
        peer("bob", 2, coverage=(9, 9)),
        peer("cat", 2, coverage=(4, 8)),
        peer("dan", 2, coverage=(7, 7, 7)),
        peer("eve", 1, coverage=(1, 1)),
    )
    assert coverage_of(Anchor(2, "a"), others, 2) == (4, 8)
    assert coverage_of(Anchor(3, "a"), others, 2) == (0, 0)


def test_reasons_name_peers_rather_than_show_their_ids():
    ids = [Identity.ephemeral().peer_id for _ in range(3)]
    seen = SwarmView(
        "me", (peer("ann", 3).model_copy(update={"peer": ids[0]}),), names={ids[1]: "bob"}
    )
    told = seen.with_names(f"dial failed: {ids[0]} waits; {ids[1]} hung up, {ids[2]} too")
    assert told == f"dial failed: ann waits; bob hung up, …{ids[2][-6:]} too"
