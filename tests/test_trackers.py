"""Trackers: what they are given, when they are opened, and that training goes on without them."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from p2pllm.config.peer import PeerConfig, TrackingConfig
from p2pllm.errors import TrackerFailed, TrackerMissing
from p2pllm.events import (
    AggregationMeasured,
    EvaluationSeen,
    RoundCommitted,
    StepDone,
    TrainerEvaluated,
    Trouble,
)
from p2pllm.trackers import Tracked, Tracking, numbers, open_trackers

STEP = StepDone(round=1, step=2, steps=3, loss=3.5, learning_rate=0.1, tokens_per_second=9)
COMMITTED = RoundCommitted(
    round=1,
    digest="ab",
    peers=["ann", "bob"],
    samples=40,
    loss=3.25,
    tokens_per_second=412.0,
    seconds_training=9.0,
    seconds_waiting=0.5,
    seconds_averaging=0.25,
    bytes_sent=1200,
    bytes_received=1300,
    deadline=30.0,
    left_out={"cat": "not ready"},
    cut_down={},
)
AFTER = TrainerEvaluated(round=2, when="after", loss=3.0, rows=8, seconds=1.0)


class FakeRun:
    """A run of a hosted tracker."""

    def __init__(self, **settings):
        self.settings, self.rows, self.axes, self.is_finished = settings, [], {}, False

    def define_metric(self, name, step_metric):
        self.axes[name] = step_metric

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        self.is_finished = True


@pytest.fixture
def hosted(monkeypatch):
    """Puts a module with `init` in place of wandb or trackio; gives the runs it has begun."""
    runs: list[FakeRun] = []

    def begin(**settings):
        runs.append(FakeRun(**settings))
        return runs[-1]

    for name in ("wandb", "trackio"):
        module = ModuleType(name)
        module.init = begin  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    return runs


def opened(*trackers, role="trainer", folder="x", **tracking):
    config = PeerConfig(trackers=trackers, tracking=TrackingConfig(**tracking))
    who = Tracked("tiny-0123456789", "ann", role, Path(folder), {"rounds": 4})
    return open_trackers(config, who)


def test_the_numbers_have_the_names_of_the_journal():
    assert numbers(STEP) == {
        "step_done/loss": 3.5,
        "step_done/learning_rate": 0.1,
        "step_done/tokens_per_second": 9.0,
    }
    committed = numbers(COMMITTED)
    assert committed["round_committed/bytes_sent"] == 1200
    assert committed["round_committed/peers"] == 2
    assert committed["round_committed/left_out"] == 1
    assert not {key for key in committed if key.endswith(("/digest", "/round", "/time"))}
    assert numbers(AFTER)["trainer_evaluated_after/loss"] == 3.0
    measured = AggregationMeasured(round=2, error=0.01, peers=["ann", "bob"], members=3)
    assert numbers(measured) == {
        "aggregation_measured/error": 0.01,
        "aggregation_measured/peers": 2,
        "aggregation_measured/members": 3,
    }


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_hosted_run_gets_steps_and_rounds_on_axes_of_their_own(hosted, name):
    tracking = opened(name, project="p", group="g")
    for event in (STEP, STEP, COMMITTED, AFTER, Trouble(what="no number")):
        tracking(event)
    tracking.close()
    [run] = hosted
    assert run.is_finished
    places = [(row.get("local_step"), row.get("round")) for row in run.rows]
    assert places == [(1, None), (2, None), (None, 1), (None, 2)]
    assert run.rows[0]["step_done/loss"] == 3.5
    assert run.axes == {"*": "round", "step_done/*": "local_step"}
    settings = run.settings
    assert (settings["project"], settings["group"], settings["name"]) == (
        "p",
        "g",
        "tiny-0123456789-ann",
    )
    assert settings["config"] == {"rounds": 4, "role": "trainer"}


def test_wandb_knows_the_entity_and_leaves_the_screen_alone(hosted):
    opened("wandb", entity="team")
    assert hosted[0].settings["entity"] == "team"
    assert hosted[0].settings["settings"]["console"] == "off"
    assert hosted[0].settings["group"] == "tiny-0123456789"


def test_only_the_aggregator_opens_them_when_asked(monkeypatch, hosted):
    tracking = opened("wandb", role="trainer", roles="aggregator")
    tracking(STEP)
    assert not hosted
    opened("wandb", role="aggregator", roles="aggregator")
    assert len(hosted) == 1
    monkeypatch.setitem(sys.modules, "wandb", None)  # a trainer does not need the package then
    opened("wandb", role="trainer", roles="aggregator")


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_package_that_is_not_there_is_a_letter_with_the_command(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TrackerMissing, match=f"pip install {name}"):
        opened(name)
    opened("jsonl")


def test_a_tracker_that_does_not_start_is_a_letter(monkeypatch):
    def refuse(**settings):
        raise RuntimeError("no login")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    with pytest.raises(TrackerFailed, match="no login"):
        opened("wandb")


def test_a_tracker_that_fails_is_given_up_and_the_others_go_on(caplog):
    class Broken(FakeRun):
        def log(self, point):
            raise ConnectionError("gone")

        def close(self):
            raise ConnectionError("still gone")

    class Sound(Broken):
        def log(self, point):
            self.rows.append(point)

    sound = Sound()
    tracking = Tracking({"broken": Broken(), "sound": sound})
    tracking(STEP)
    tracking(STEP)
    tracking.close()
    assert len(sound.rows) == 2
    assert caplog.text.count("broken has failed") == 1
    assert caplog.text.count("sound has failed") == 1


def test_tensorboard_gets_every_number_as_a_scalar(monkeypatch, tmp_path):
    written: list[object] = []
    folders = []

    class Writer:
        def __init__(self, log_dir):
            folders.append(log_dir)

        def add_scalar(self, name, value, at):
            written.append((name, value, at))

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboard", ModuleType("tensorboard"))
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer)
    )
    tracking = opened("tensorboard", folder=tmp_path)
    tracking(EvaluationSeen(round=3, loss=2.5))
    tracking.close()
    assert folders == [str(tmp_path / "tensorboard")]
    assert written == [("evaluation_seen/loss", 2.5, 3), "closed"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_tensorboard_has_written_can_be_read_back(tmp_path):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracking = opened("tensorboard", folder=tmp_path)
    for event in (STEP, STEP, COMMITTED):
        tracking(event)
    tracking.close()
    read = reading.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(s.step, s.value) for s in read.Scalars("step_done/loss")] == [(1, 3.5), (2, 3.5)]
    [sent] = read.Scalars("round_committed/bytes_sent")
    assert (sent.step, sent.value) == (1, 1200.0)
