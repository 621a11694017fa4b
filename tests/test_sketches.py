"""The aggregator's report of each round's aggregation error: from records, and in a whole run."""

import base64
import math

import numpy as np
import pytest

from p2pllm.events import AggregationMeasured, Events, RoundCommitted
from p2pllm.roles import aggregator, sketches
from p2pllm.roles.sketches import Sketches
from p2pllm.swarm.records import Progress, Sketch
from p2pllm.swarm.rounds import Anchor, SwarmView
from p2pllm.training.aggregation import SKETCH_SIZE, aggregation_error
from tests.churn import SIZE, Churn, Follower, Script
from tests.counting import CountingLearner, counting_adapter

HERE = Anchor(3, "d3")
NUMBERS = np.random.default_rng(1).standard_normal(SKETCH_SIZE).astype(np.float32)


def said(name, numbers=NUMBERS, anchor=HERE, members=4, weight=0.25, **fields):
    return Progress(
        **{
            "peer": f"id-{name}",
            "name": name,
            "role": "trainer",
            "state": "training",
            "round": anchor.round,
            "digest": anchor.digest,
            "sketch": Sketch.of(weight, members, numbers),
            **fields,
        }
    )


class Meter:
    """One that is looked at view by view."""

    def __init__(self):
        self.reports: list[AggregationMeasured] = []
        self._sketches = Sketches(Events(self.reports.append))  # type: ignore[arg-type]

    def sees(self, *peers, anchor=HERE):
        return self._sketches.are_complete(anchor, SwarmView("me", peers))


@pytest.fixture
def meter():
    return Meter()


def test_it_waits_for_all_members_and_reports_once(meter):
    assert not meter.sees(said("ann"))
    assert not meter.sees(said("bob"), said("cat"))
    assert meter.reports == []
    everybody = [said(name) for name in ("ann", "bob", "cat", "dan")]
    assert meter.sees(*everybody)
    assert meter.sees(*everybody)
    [report] = meter.reports
    assert (report.round, report.peers, report.members) == (3, ["ann", "bob", "cat", "dan"], 4)
    whole, wrong = np.linalg.norm(NUMBERS.reshape(2, -1), axis=1)
    assert report.error == pytest.approx(wrong / whole, rel=0.01)


def test_members_count_by_their_weights(meter):
    opposite = np.concatenate([NUMBERS[:256], -NUMBERS[256:]])
    ann, bob = said("ann", members=2, weight=0.75), said("bob", opposite, members=2, weight=0.25)
    assert meter.sees(ann, bob)
    whole, wrong = np.linalg.norm(NUMBERS.reshape(2, -1), axis=1)
    assert meter.reports[0].error == pytest.approx(wrong / whole / 2, rel=0.01)


def test_when_some_stay_away_it_says_of_how_many_it_is(meter, monkeypatch):
    monkeypatch.setattr(sketches, "_PATIENCE", 0.0)
    assert meter.sees(said("ann"), said("bob"), said("cat", sketch=None))
    assert (meter.reports[0].peers, meter.reports[0].members) == (["ann", "bob"], 4)


@pytest.mark.parametrize(
    "others",
    [
        (),
        (said("bob", anchor=Anchor(3, "other")),),
        (said("bob", anchor=Anchor(2, "d3")),),
        (said("bob", role="bootstrap"),),
        (said("bob", sketch=None),),
    ],
)
def test_one_member_alone_is_no_measurement(meter, monkeypatch, others):
    monkeypatch.setattr(sketches, "_PATIENCE", 0.0)
    assert meter.sees(said("ann"), *others)
    assert meter.reports == []


@pytest.mark.parametrize(
    "peers",
    [
        (),
        (said("ann", sketch=None),),  # it went on alone
        (said("ann", sketch=None, anchor=Anchor(2, "d2")), said("bob", sketch=None)),
    ],
)
def test_where_nobody_could_say_anything_it_does_not_wait(meter, peers):
    assert meter.sees(*peers)
    assert meter.reports == []


def test_the_start_is_no_round_to_wait_for(meter):
    start = Anchor(0, "d0")
    unsaid = [said(name, sketch=None, anchor=start) for name in ("ann", "bob")]
    assert meter.sees(*unsaid, anchor=start)


def test_members_hold_an_adapter_before_they_have_sketched_their_part_in_it(meter):
    assert not meter.sees(said("ann", sketch=None), said("bob", sketch=None))
    assert not meter.sees(said("ann", sketch=None), said("bob", members=2))
    assert meter.sees(said("ann", members=2), said("bob", members=2))
    assert meter.reports[0].peers == ["ann", "bob"]


def test_a_round_that_is_overtaken_is_reported_and_the_next_not_waited_for(meter):
    after = Anchor(4, "d4")
    assert not meter.sees(said("ann"), said("bob"))
    assert meter.sees(said("ann", anchor=after), anchor=after)
    assert [(r.round, len(r.peers)) for r in meter.reports] == [(3, 2)]
    assert not meter.sees(said("ann", anchor=Anchor(5, "d5")), anchor=Anchor(5, "d5"))


def scaled(factor):
    with np.errstate(over="ignore"):
        return {"numbers": Sketch.of(0.25, 4, NUMBERS * np.float32(factor)).numbers}


LIES = [
    *({"numbers": text} for text in ("", "no base64!", "\u00e4", base64.b64encode(b"x").decode())),
    *(scaled(factor) for factor in (np.nan, np.inf, 3e38, 1e9)),
    {"members": 4096},
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("lie", LIES)
def test_a_liar_can_neither_end_the_aggregator_nor_move_the_number_far(meter, lie):
    sketch = Sketch.of(0.25, 4, NUMBERS).model_copy(update=lie)
    honest = [said(name) for name in ("ann", "bob", "cat")]
    record = Progress.model_validate_json(said("liar", sketch=sketch).model_dump_json())
    assert meter.sees(*honest, record)
    [report] = meter.reports
    whole, wrong = np.linalg.norm(NUMBERS.reshape(2, -1), axis=1)
    assert report.error == pytest.approx(wrong / whole, rel=0.01)
    assert {"ann", "bob", "cat"} <= set(report.peers)
    assert report.members == 4


@pytest.mark.parametrize(
    "lie",
    [
        {"weight": 0.0},
        {"weight": -1.0},
        {"weight": 1e30},
        {"weight": math.nan},
        {"members": 0},
        {"members": 10**9},
        {"numbers": "A" * 2000},
    ],
)
def test_a_record_with_a_sketch_out_of_bounds_is_none(lie):
    sketch = Sketch.of(0.25, 4, NUMBERS).model_copy(update=lie)
    with pytest.raises(ValueError, match="sketch"):
        Progress.model_validate_json(said("liar", sketch=sketch).model_dump_json())


# ---- whole runs


class Unequal(Churn):
    """Of the third trainer, a delta 100 times as large as its turn."""

    def learner(self, step, before_training):
        step *= 100 if len(self.peers) == 3 else 1
        return CountingLearner(SIZE, step, before_training, *self.local_epoch)


class Patient(Script):
    """Trains only when the aggregator has reported the round before."""

    def __init__(self, churn):
        super().__init__()
        self._churn = churn

    def before_training(self, round):
        self._churn.wait_for("agg", lambda agg: len(agg.of(AggregationMeasured)) >= round)


def reports(folder, monkeypatch, *names, rounds=2, **averaging):
    monkeypatch.setattr(aggregator, "_PAUSE", 0.02)
    monkeypatch.setattr(sketches, "_PATIENCE", 15.0)
    churn = Unequal(folder, rounds, min_peers=len(names), **averaging)
    churn.scripts[names[0]] = Patient(churn)
    peers = churn.start("agg", kind=Follower).play(*names)
    commits = [e for name in names for e in peers[name].of(RoundCommitted)]
    assert {len(e.peers) for e in commits} == {len(names)}
    told = peers["agg"].of(AggregationMeasured)
    assert [e.round for e in told] == list(range(1, rounds + 1))
    assert all(e.peers == sorted(names) and e.members == len(names) for e in told)
    return [e.error for e in told]


def exact(*each):
    """Of one round; all values of a peer's adapter are alike, so sketches have no variance."""
    peers = [np.full(SIZE, value, np.float32) for value in each]
    return aggregation_error(counting_adapter(SIZE), peers, [1.0] * len(each))


@pytest.mark.parametrize(
    ("averaging", "anchor"),
    [({"compression": "none"}, 2.5), ({}, 2.5), ({"outer": "nesterov"}, 2.5 * 0.7 * 1.9)],
)
def test_the_aggregator_reports_the_exact_error_of_each_round(
    tmp_path, monkeypatch, averaging, anchor
):
    """The trainers, seated second and third, add 2 and 3 (thousandths) to each value."""
    found = reports(tmp_path, monkeypatch, "ann", "bob", **averaging)
    expected = [exact(2, 3), exact(anchor + 2, anchor + 3)]
    assert found == pytest.approx(expected, rel=0.03)


def test_a_delta_that_was_cut_down_counts_as_it_was_averaged(tmp_path, monkeypatch):
    found = reports(tmp_path, monkeypatch, "ann", "bob", "cat", rounds=1, clip=2.0)
    assert found == pytest.approx([exact(2, 3, 2 * 3)], rel=0.03)


@pytest.mark.parametrize("rule", ["freeze_a", "alternate"])
def test_where_trainers_share_one_half_the_aggregator_reports_no_error(tmp_path, monkeypatch, rule):
    assert reports(tmp_path, monkeypatch, "ann", "bob", rounds=3, lora=rule) == [0, 0, 0]
