"""When a local epoch is about to end, and when it would end too late."""

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest

from p2pllm.config.run import (
    AveragingConfig,
    DataConfig,
    LocalEpoch,
    ModelConfig,
    RunConfig,
    TrainingConfig,
)
from p2pllm.events import StepDone
from p2pllm.roles import pace as module
from p2pllm.roles.pace import Pace
from p2pllm.swarm.network import Timeouts


class Clocked:
    """A local epoch by a clock that we turn, in a swarm whose group closes when we say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, local: LocalEpoch, overlap: bool = False):
        self.now, self.closes_at = 100.0, math.inf
        self.told: list[float] = []
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))
        swarm = SimpleNamespace(
            expect_end=self.told.append,
            closes_in=lambda: self.closes_at - self.now,
            timeouts=Timeouts(heartbeat=1.0),
        )
        run = RunConfig(
            name="paced",
            model=ModelConfig(name="none"),
            data=DataConfig(source="none"),
            training=TrainingConfig(local=local),
            averaging=AveragingConfig(overlap=overlap),
        )
        self.steps = local.steps
        self.pace = Pace(cast(Any, swarm), run)

    def step(self, step: int, seconds: float) -> None:
        """Takes so many seconds."""
        self.now += seconds
        self.pace.step(
            StepDone(
                round=0,
                step=step,
                steps=self.steps,
                loss=1.0,
                learning_rate=1.0,
                tokens_per_second=1.0,
            )
        )


def test_the_steps_so_far_foretell_the_end(monkeypatch):
    epoch = Clocked(monkeypatch, LocalEpoch(steps=4))
    for step, seconds in enumerate((1.0, 2.0, 3.0, 2.0), start=1):
        epoch.step(step, seconds)
    assert epoch.told == [3.0, 3.0, 2.0]  # after the last one there is nothing to foretell


def test_a_local_epoch_of_so_many_seconds_needs_no_guess(monkeypatch):
    epoch = Clocked(monkeypatch, LocalEpoch(seconds=5.0))
    for step in (1, 2, 3):
        epoch.step(step, 2.0)
    assert epoch.told == [3.0, 1.0]


def test_with_overlap_nobody_waits_for_the_lines(monkeypatch):
    epoch = Clocked(monkeypatch, LocalEpoch(steps=4), overlap=True)
    epoch.step(1, 1.0)
    assert epoch.told == []


@pytest.mark.parametrize(("closes_in", "is_late"), [(math.inf, False), (6.0, False), (4.9, True)])
def test_late_is_who_would_miss_the_group_with_another_step(monkeypatch, closes_in, is_late):
    epoch = Clocked(monkeypatch, LocalEpoch(steps=10))
    epoch.step(1, 1.0)
    epoch.closes_at = epoch.now + 3.0 + closes_in
    epoch.step(2, 3.0)  # another such step, and two heartbeats for the offer to get there
    assert epoch.pace.is_late is is_late
