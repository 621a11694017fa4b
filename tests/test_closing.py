"""When a round's group closes, and with whom: the rules without any network."""

import pytest

from p2pllm.config.run import AveragingConfig
from p2pllm.coverage import Span
from p2pllm.swarm.closing import Attendance, losers_of
from p2pllm.swarm.group import Member
from p2pllm.swarm.records import Progress
from p2pllm.swarm.rounds import Anchor, SwarmView, precedes

HERE = Anchor(3, "a")
RULES = AveragingConfig(min_peers=2, max_group=3)
DEADLINE, RECORD_LIFE = 10.0, 60.0  # seconds


def peer(name, round=3, digest="a", state="training", role="trainer"):
    return Progress(peer=name, name=name, role=role, state=state, round=round, digest=digest)


def view(*peers):
    return SwarmView("me", peers)


def came(*ready, training=(), waited=0.0, leader_trains=True, **more):
    return Attendance(
        HERE,
        tuple(Member(name, 8.0, 1.0) for name in ready),
        frozenset([*ready, *training]),
        waited,
        leader_trains,
        **{"blamed": {}, **more},
    )


EVERYBODY = view(peer("ann", state="ready"), peer("bob"), peer("cat"))


def test_it_closes_in_the_moment_the_last_one_is_ready():
    here = came("me", "ann", "bob", training=["cat"])
    assert here.missing(EVERYBODY) == {"cat"}
    rules = RULES.model_copy(update={"max_group": 8})
    assert not here.closes(EVERYBODY, rules, DEADLINE)
    assert came("me", "ann", "bob", "cat").closes(EVERYBODY, rules, DEADLINE)


def test_who_has_come_is_awaited_before_its_record_is_there():
    here = came("me", "ann", training=["bob", "cat", "eve"])
    assert here.missing(EVERYBODY) == {"bob", "cat", "eve"}
    assert came("me", "ann", training=["eve"], blamed={"eve": "lied"}).missing(EVERYBODY) == {
        "bob",
        "cat",
    }


def test_it_closes_at_the_deadline_without_those_who_are_not_ready():
    here = came("me", "ann", training=["bob"], waited=9.9)
    assert not here.closes(EVERYBODY, RULES, DEADLINE)
    here = came("me", "ann", training=["bob"], waited=10.0)
    assert here.closes(EVERYBODY, RULES, DEADLINE)
    assert here.left_out(EVERYBODY, here.members(3)) == {
        "bob": "not ready after 10.0 s",
        "cat": "not ready after 10.0 s",
    }


def test_a_full_group_waits_for_nobody_and_says_who_was_too_many():
    here = came("me", "cat", "bob", "ann")
    assert came("me", "bob", "ann").closes(EVERYBODY, RULES, DEADLINE)
    members = here.members(RULES.max_group)
    assert [m.peer for m in members] == ["ann", "bob", "cat"]
    assert here.left_out(EVERYBODY, members) == {"me": "the group was full"}


@pytest.mark.parametrize(
    ("ready", "least", "enough"), [(0, 1, False), (1, 1, True), (1, 2, False), (2, 2, True)]
)
def test_a_quorum_is_the_runs_and_at_least_one(ready, least, enough):
    rules = RULES.model_copy(update={"min_peers": least})
    assert came(*["ann", "bob"][:ready]).has_quorum(rules) == enough


def test_the_leader_is_awaited_where_it_trains_and_only_there():
    alone = view(peer("ann"))
    assert came("ann").missing(alone) == {"me"}
    assert came("ann", leader_trains=False).missing(alone) == set()


def test_who_leaves_two_hellos_unanswered_is_not_awaited():
    assert came("me", "ann", silent={"bob": 1}).missing(EVERYBODY) == {"bob", "cat"}
    here = came("me", "ann", silent={"bob": 2, "dan": 5})
    assert here.missing(EVERYBODY) == {"cat"}
    assert here.gone(EVERYBODY) == {"bob"}  # dan was not expected
    assert here.left_out(EVERYBODY, here.members(3))["bob"] == "does not answer"
    assert came("me", "ann", training=["bob"], silent={"bob": 2}).gone(EVERYBODY) == set()


def test_who_is_blamed_is_not_awaited_and_the_reason_stays():
    here = came("me", "ann", blamed={"bob": "sent garbage"}, refused={"bob": "stale"})
    assert here.missing(EVERYBODY) == {"cat"}
    assert here.left_out(EVERYBODY, here.members(3))["bob"] == "sent garbage"


def test_who_holds_another_adapter_is_named_and_not_awaited():
    seen = view(peer("ann"), peer("bob", 2), peer("cat", digest="b"), peer("dan", state="joining"))
    here = came("me", "ann")
    assert here.missing(seen) == set()
    why = "holds round {}, not this adapter of round 3"
    assert here.left_out(seen, here.members(3)) == {"bob": why.format(2), "cat": why.format(3)}


def test_who_came_in_vain_is_told_why_rather_than_how_late():
    here = came("me", "ann", waited=12.0, refused={"bob": "stale anchor"})
    assert here.left_out(EVERYBODY, here.members(3))["bob"] == "stale anchor"


def test_one_that_has_lost_all_company_waits_and_one_that_never_had_any_does_not():
    assert came("me").patience(view(), had_company=False, record_life=RECORD_LIFE) == 0.0
    assert came("me").patience(view(), had_company=True, record_life=RECORD_LIFE) > RECORD_LIFE


def test_a_minority_waits_until_the_others_records_have_expired():
    def patience(here):
        return here.patience(EVERYBODY, had_company=True, record_life=RECORD_LIFE)

    assert patience(came("me")) == RECORD_LIFE  # 1 of 4
    assert patience(came("me", "ann")) == 0.0  # 2 of 4
    assert patience(came("ann", leader_trains=False)) == RECORD_LIFE  # 1 of 3


def test_of_two_with_the_same_rows_the_one_that_leads_stays():
    span = Span(0, 0, 8)
    first, second = ("ann", "bob") if precedes("ann", "bob") else ("bob", "ann")
    keeper, loser = (Member(p, 8.0, 1.0, spans=(span,)) for p in (first, second))
    other = Member("cat", 8.0, 1.0, spans=(Span(1, 0, 8),))
    assert losers_of(loser, [keeper, loser, other]) == [loser]
    assert losers_of(keeper, [keeper, loser, other]) == [loser]
    assert losers_of(other, [keeper, other]) == []


def test_who_was_in_the_group_before_and_has_no_record_any_more_is_named():
    # For example when an attempt died with half of its members, and it took long to find out.
    seen = view(peer("ann"), peer("bob", state="leaving"))
    here = came("me", "ann", before=frozenset({"me", "ann", "bob", "cat", "dan"}))
    gone = dict.fromkeys(["cat", "dan"], "is no longer there")
    assert here.left_out(seen, here.members(3)) == gone
    here = came("me", "ann", before=frozenset({"cat"}), blamed={"cat": "died while sending"})
    assert here.left_out(seen, here.members(3)) == {"cat": "died while sending"}
