"""Conventional training: the learner's steps and nothing else, over all rows."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from p2pllm import errors
from p2pllm.config.load import load_run
from p2pllm.config.peer import PeerConfig
from p2pllm.config.run import LocalEpoch
from p2pllm.data.corpus import load_corpus
from p2pllm.events import Evaluated, Event, Events, Finished, RoundCommitted
from p2pllm.model.adapter import adapter_values, attach_adapter
from p2pllm.model.pretrained import load_base
from p2pllm.roles.centralized import as_one, train
from p2pllm.training.learner import Learner
from p2pllm.training.source import ShardSource

TINY = Path(__file__).parent.parent / "configs/tiny.yaml"


@pytest.fixture
def run():
    settings = ("rounds=2", "data.eval_size=8", "data.max_length=32", "evaluation.max_rows=4")
    return load_run(TINY, settings)


def trained(run, folder, stop=None):
    events: list[Event] = []
    train(run, PeerConfig(output=folder, device="cpu"), Events(events.append), stop or Stop())
    return events


class Stop(threading.Event):
    """Asked to stop after so many steps of training."""

    def __init__(self, after: float = float("inf")) -> None:
        super().__init__()
        self._left = after

    def is_set(self) -> bool:
        self._left -= 1
        return self._left < 0


def of(events, kind):
    return [event for event in events if isinstance(event, kind)]


def test_it_is_the_learner_and_nothing_else(run, tmp_path):
    events = trained(run, tmp_path)
    base = load_base(run.model, run.seed, "cpu")
    rows = load_corpus(run.data, base.tokenizer, run.seed).train
    source = ShardSource(rows, range(len(rows)), run.seed)
    learner = Learner(attach_adapter(base, run.lora, run.seed), source, run)
    for round in range(2):
        learner.train(round, lambda step: None, lambda: False)
    folder = tmp_path / "tiny/train"
    assert np.array_equal(adapter_values(folder / "final"), learner.values())
    assert [e.round for e in of(events, Evaluated)] == [0, 1, 2]
    assert [e.samples for e in of(events, RoundCommitted)] == [4, 4]
    assert of(events, Finished)[0].path == str(folder / "final")
    last = (folder / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["event"] == "finished"


def test_it_goes_on_from_its_last_checkpoint(run, tmp_path):
    stopped = trained(run, tmp_path, Stop(after=4))
    assert [e.round for e in of(stopped, RoundCommitted)] == [0]
    assert not of(stopped, Finished)
    events = trained(run, tmp_path)
    assert [e.round for e in of(events, RoundCommitted)] == [1]
    facts = json.loads((tmp_path / "tiny/train/final/round.json").read_text())
    assert facts["samples"] == 8
    assert list(facts["losses"]) == ["0", "1", "2"]
    assert len(trained(run, tmp_path)) < 10  # nothing is left to do


def test_another_run_of_the_same_name_does_not_mix_in(run, tmp_path):
    trained(run, tmp_path)
    with pytest.raises(errors.ForeignFolder):
        trained(run.model_copy(update={"seed": 5}), tmp_path)


@pytest.mark.parametrize(
    ("local", "all_of_them"),
    [
        ({"steps": 5}, {"steps": 20}),
        ({"seconds": 1.5}, {"seconds": 6.0}),
        ({"epochs": 0.5}, {"epochs": 0.125}),  # of 16 shards
    ],
)
def test_it_does_the_work_of_as_many_trainers_as_asked(run, local, all_of_them):
    training = run.training.model_copy(update={"local": LocalEpoch(**local)})
    run = run.model_copy(update={"training": training})
    assert as_one(run, 4).training.local == LocalEpoch(**all_of_them)
