"""The swarm of the learning benchmark: it must be nothing but learners and their average."""

from itertools import pairwise

import numpy as np
import pytest

from p2pllm.config.run import AveragingConfig, DataConfig, ModelConfig, RunConfig, TrainingConfig
from p2pllm.training.learner import Learner
from p2pllm.training.source import ShardSource
from tests.benchmarks.learning_report import markdown
from tests.benchmarks.one_process import OneProcessSwarm


def plan(peers, **averaging):
    return RunConfig(
        name="test",
        rounds=4,
        model=ModelConfig(name="none"),
        data=DataConfig(source="none"),
        training=TrainingConfig.model_validate(
            {"local": {"steps": 2}, "batch_size": 2, "learning_rate": 0.01}
        ),
        averaging=AveragingConfig(min_peers=peers, max_group=peers, **averaging),
    )


def sources(rows, peers):
    return [ShardSource(rows, range(at, len(rows), peers), seed=1) for at in range(peers)]


def test_a_swarm_of_one_learns_what_its_learner_does(tiny_adapter, rows):
    run = plan(1, compression="none")
    swarm = OneProcessSwarm(run, tiny_adapter, sources(rows, 1))
    played = [swarm.play_round() for _ in range(2)]
    tiny_adapter.adopt(tiny_adapter.initial_values(run.seed))
    learner = Learner(tiny_adapter, sources(rows, 1)[0], run)
    for round in range(2):
        learner.train(round, lambda step: None, lambda: False)
    swarm.close()
    np.testing.assert_allclose(swarm.values, learner.values(), atol=1e-6)
    assert [r.samples for r in played] == [4, 4]
    assert [r.error for r in played] == [0, 0]


def test_a_round_adds_the_mean_of_the_peers_work(tiny_adapter, rows):
    run = plan(4, compression="none", robust="none")
    swarm = OneProcessSwarm(run, tiny_adapter, sources(rows, 4))
    played, first = swarm.play_round(), tiny_adapter.initial_values(run.seed)
    apart = []
    for source in sources(rows, 4):
        tiny_adapter.adopt(first)
        learner = Learner(tiny_adapter, source, run)
        learner.train(0, lambda step: None, lambda: False)
        apart.append(learner.values())
    swarm.close()
    np.testing.assert_allclose(swarm.values, np.mean(apart, axis=0), atol=1e-6)
    assert played.error > 0
    sent_and_received = 2 * 2 * 3 / 4 * 4 * tiny_adapter.size  # of each value four bytes
    assert played.bytes_per_peer == pytest.approx(sent_and_received, rel=0.1)


@pytest.mark.parametrize("outer", ["mean", "nesterov"])
def test_alternation_moves_one_half_in_each_round_and_is_exact(tiny_adapter, rows, outer):
    swarm = OneProcessSwarm(plan(4, lora="alternate", outer=outer), tiny_adapter, sources(rows, 4))
    at = tiny_adapter.size_of_a
    states, errors = [swarm.values], []
    for _ in range(2):
        errors.append(swarm.play_round().error)
        states.append(swarm.values)
    swarm.close()
    moved = [
        ((new[:at] != old[:at]).any(), (new[at:] != old[at:]).any())
        for old, new in pairwise(states)
    ]
    assert moved == [(False, True), (True, False)]
    assert max(errors) < 1e-6


def told(case, seed, loss, size=8.0):
    run = {"case": case, "seed": seed, "loss": loss, "losses": [(0, 4.0), (8, loss)]}
    run |= {"samples": 512, "rows": 160, "tokens": 2000, "cpu_seconds": 100.0}
    alone = case.startswith("one machine")
    rounds = [{"bytes_per_peer": size * 1e6, "error": 0.1, "cut_down": 0}]
    return run if alone else run | {"rounds": rounds}


def test_the_page_says_plainly_what_is_not_met_and_what_follows():
    config = plan(4)
    found = {
        "about": {
            "command": "bench",
            "date": "today",
            "cores": 2,
            "cpu": "one",
            "system": "Linux",
            "versions": {},
            "load_before": [0.0],
            "load_after": [0.0],
        },
        "plan": {"peers": 4, "rounds": 4, "curve_rows": 32}
        | config.model_dump(mode="json", include={"training", "averaging", "lora", "data"}),
        "rates": {"alone": 0.002, "swarm": 0.004},
        "sweep": [
            told("one machine", 1, 3.0) | {"rate": 0.002},
            told("4 peers, IID", 1, 3.3) | {"rate": 0.002},
        ],
        "runs": [
            told("one machine", 1, 3.0),
            told("4 peers, IID", 1, 3.02),
            told("4 peers, by module", 1, 3.12),
            told("lora: alternate", 1, 3.13, size=4.0),
            told("outer: nesterov", 1, 3.14),
        ],
    }
    page = markdown(found)
    assert "| 4 peers, IID, with the defaults, to one machine | ≤ 1.01 | 1.0067 | 1 | met |" in page
    assert "| ≤ 1.03 | 1.0400 | 1 | **not met** |" in page
    assert "`lora: alternate`: 1.0032 of the default's loss, with 50 % of its bytes: **it" in page
    assert "`outer: nesterov`: 1.0064 of the default's loss, with 100 % of its bytes: the" in page
    assert "| 0.002 | 3.0000 | 3.3000 | 3.0000 | 3.3000 | 1.1000 |" in page
    assert "**unfinished**" in page
