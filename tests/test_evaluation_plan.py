"""Which trainers evaluate when, and which rounds the aggregator writes to disk: what a run plans,
over the in-memory swarm."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from p2pllm.config.peer import PeerConfig
from p2pllm.config.run import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    RunConfig,
)
from p2pllm.errors import DeviceMemoryFull
from p2pllm.events import CheckpointSaved, Evaluated, RoundCommitted, TrainerEvaluated, Trouble
from p2pllm.roles import aggregator, own_evaluation, trainer
from p2pllm.training.evaluation import EvaluationResult
from tests.churn import Churn, Follower


@pytest.fixture(autouse=True)
def _lively(monkeypatch):
    """Peers look around more often than in real life."""
    monkeypatch.setattr(trainer, "_LOOK", 0.05)
    monkeypatch.setattr(trainer, "_PAUSE", 0.1)
    monkeypatch.setattr(aggregator, "_PAUSE", 0.02)


class FirstValue:
    """An evaluator that calls an adapter's first value its loss."""

    def evaluate(self, values):
        return EvaluationResult(loss=float(values[0]), rows=3, tokens=9, seconds=0.0)


class TooLarge:
    def evaluate(self, values):
        raise DeviceMemoryFull(rows=8, reason="it is a small one")


def trainers(folder, rounds, evaluator=None, **evaluation):
    churn = Churn(folder, rounds, {"evaluation": EvaluationConfig(**evaluation)}, min_peers=2)
    churn.evaluator = evaluator or FirstValue()
    return churn.play("ann", "bob")


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ("never", []),
        ("before", [(1, "before"), (2, "before")]),
        ("after", [(1, "after"), (2, "after")]),
        ("both", [(1, "before"), (1, "after"), (2, "before"), (2, "after")]),
    ],
)
def test_a_trainer_evaluates_when_the_run_says_so_and_the_last_adapter_too(
    tmp_path, when, expected
):
    for peer in trainers(tmp_path, 2, on_trainers=when).values():
        assert [(e.round, e.when) for e in peer.of(TrainerEvaluated)] == expected


def test_own_work_is_measured_before_the_average_and_the_adapter_after_it(tmp_path):
    peers = trainers(tmp_path, 1, on_trainers="both")
    (own_ann, after_ann), (own_bob, after_bob) = (
        [e.loss for e in peers[name].of(TrainerEvaluated)] for name in ("ann", "bob")
    )
    assert own_ann != own_bob
    assert after_ann == after_bob == pytest.approx((own_ann + own_bob) / 2, rel=1e-2)  # fp16


def test_every_so_many_rounds_and_always_the_last(tmp_path):
    for peer in trainers(tmp_path, 5, on_trainers="after", every=3).values():
        assert [e.round for e in peer.of(TrainerEvaluated)] == [3, 5]


def test_an_evaluation_that_fails_does_not_end_the_training(tmp_path):
    for peer in trainers(tmp_path, 2, TooLarge(), on_trainers="after").values():
        assert len(peer.of(RoundCommitted)) == 2
        assert any("too little memory" in e.what for e in peer.of(Trouble))


@pytest.mark.parametrize(
    ("plan", "kept"),
    [
        ({"every": 0}, []),
        ({"every": 0, "at": [1, 3]}, [1, 3]),
        ({"every": 2, "keep": 1, "at": [1]}, [1, 4]),
        ({"every": 1, "keep": None}, [1, 2, 3, 4]),
    ],
)
def test_the_rounds_that_the_run_names_are_on_disk_and_always_the_final_one(tmp_path, plan, kept):
    """The aggregator here is one that was asked not to evaluate."""
    churn = Churn(tmp_path, 4, {"checkpoint": CheckpointConfig(**plan)}, min_peers=2)
    for round in range(4):
        churn.slow("ann", round, 0.3)  # for the aggregator to see every round
    follower = churn.start("agg", kind=Follower).play("ann", "bob")["agg"]
    [folder] = tmp_path.glob("*/agg")
    assert sorted(int(p.name.removeprefix("round-")) for p in folder.glob("checkpoints/*")) == kept
    assert (folder / "final" / "round.json").exists()
    assert follower.of(CheckpointSaved)[-1].round == 4
    assert not follower.of(Evaluated)


def test_with_overlap_the_adapter_is_measured_without_the_work_done_ahead(tmp_path):
    plan = {"evaluation": EvaluationConfig(on_trainers="after")}
    churn = Churn(tmp_path, 3, plan, min_peers=2, overlap=True)
    churn.evaluator, churn.local_epoch = FirstValue(), (4, 0.02)
    ann, bob = ([e.loss for e in p.of(TrainerEvaluated)] for p in churn.play("ann", "bob").values())
    assert len(ann) == 3
    assert ann == bob


@pytest.mark.parametrize(
    ("config", "rows_at_once"),
    [({"evaluate": False}, None), ({}, 8), ({"micro_batch": 2}, 2), ({"micro_batch": 64}, 8)],
)
def test_a_trainer_with_private_rows_evaluates_on_the_runs_if_it_wants_to(
    monkeypatch, tiny_adapter, rows, config, rows_at_once
):
    monkeypatch.setattr(own_evaluation, "load_held_out", lambda *_: rows)
    evaluated: list[Any] = []
    monkeypatch.setattr(own_evaluation, "Evaluator", lambda *given: evaluated.append(given))
    run = RunConfig(
        name="x",
        model=ModelConfig(name="none"),
        data=DataConfig(source="none"),
        evaluation=EvaluationConfig(on_trainers="after", max_rows=4),
    )
    seat = SimpleNamespace(manifest=SimpleNamespace(run=run), config=PeerConfig(**config))
    own_evaluation.own_evaluator(cast(Any, seat), tiny_adapter, held_out=None)
    found = [(held_out, at_once) for _, held_out, at_once in evaluated]
    assert found == ([] if rows_at_once is None else [(rows[:4], rows_at_once)])
