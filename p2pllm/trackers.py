"""Trackers: the numbers of a peer's events, handed to TensorBoard, Weights & Biases or Trackio.

Their packages are optional, and imported only when a peer asks for them. It knows events and those
programs, not what the numbers mean. Whatever a tracker does, training goes on.
"""

import importlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from p2pllm.config.peer import PeerConfig, TrackingConfig
from p2pllm.errors import TrackerFailed, TrackerMissing
from p2pllm.events import (
    AggregationMeasured,
    Evaluated,
    EvaluationSeen,
    Event,
    RoundCommitted,
    StepDone,
    TrainerEvaluated,
)

log = logging.getLogger(__name__)

_WITH_NUMBERS = (
    StepDone,
    RoundCommitted,
    AggregationMeasured,
    Evaluated,
    EvaluationSeen,
    TrainerEvaluated,
)
_PLACES = ("time", "round", "step", "steps")  # say where an event belongs, and are not drawn


@dataclass(frozen=True)
class Point:
    """What one event says in numbers, under the names that they have in metrics.jsonl."""

    axis: Literal["local_step", "round"]  # local_step: of this peer since it was started
    at: int
    values: dict[str, float]


@dataclass(frozen=True)
class Tracked:
    """Whose numbers they are. `config`: what the run agrees on; nothing of it is secret."""

    run: str
    peer: str
    role: str
    folder: Path
    config: dict[str, Any]


class Tracker(Protocol):
    def log(self, point: Point) -> None: ...

    def close(self) -> None: ...


class Tracking:
    """Subscribes to `Events`. A tracker that fails is given up; it is no reason not to train."""

    def __init__(self, trackers: dict[str, Tracker]) -> None:
        self._trackers = trackers
        self._steps = 0

    def __call__(self, event: Event) -> None:
        if not self._trackers or not isinstance(event, _WITH_NUMBERS):
            return
        if isinstance(event, StepDone):
            self._steps += 1
            point = Point("local_step", self._steps, numbers(event))
        else:
            point = Point("round", event.round, numbers(event))
        for name in list(self._trackers):
            self._call(name, lambda tracker: tracker.log(point))

    def close(self) -> None:
        for name in list(self._trackers):
            self._call(name, lambda tracker: tracker.close())

    def _call(self, name: str, what: Any) -> None:
        try:
            what(self._trackers[name])
        except Exception as problem:  # noqa: BLE001 - other programs raise what they like
            del self._trackers[name]
            log.error("the tracker %s has failed and is given up: %s", name, problem)


def numbers(event: Event) -> dict[str, float]:
    """Each number of the event as `event/field`; of a list, how many are in it."""
    row = event.as_row()
    name = f"{row['event']}_{row['when']}" if "when" in row else row["event"]
    counted = {k: len(v) if isinstance(v, list | dict) else v for k, v in row.items()}
    return {
        f"{name}/{key}": float(value)
        for key, value in counted.items()
        if isinstance(value, int | float) and key not in _PLACES
    }


def open_trackers(config: PeerConfig, what: Tracked) -> Tracking:
    """Those that this peer wants; none, where they are for the aggregator only and it is not one.

    Raises TrackerMissing and TrackerFailed.
    """
    wanted = [name for name in dict.fromkeys(config.trackers) if name != "jsonl"]
    if config.tracking.roles == "aggregator" and what.role != "aggregator":
        wanted = []
    return Tracking({name: _opened(name, config.tracking, what) for name in wanted})


def _opened(name: str, config: TrackingConfig, what: Tracked) -> Tracker:
    try:
        module = importlib.import_module(name)
    except ImportError as problem:
        raise TrackerMissing(tracker=name, reason=problem) from problem
    try:
        if name == "tensorboard":
            return _TensorBoard(what)
        run: dict[str, Any] = {"project": config.project, "name": f"{what.run}-{what.peer}"}
        run["group"] = config.group or what.run
        if name == "wandb":
            quiet = {"silent": True, "console": "off"}  # the screen is ours
            run |= {"entity": config.entity, "dir": str(what.folder), "settings": quiet}
        return _HostedRun(module, {**run, "config": {**what.config, "role": what.role}})
    except Exception as problem:
        raise TrackerFailed(tracker=name, reason=problem) from problem


class _TensorBoard:
    """Event files in the peer's folder; torch brings the writer, tensorboard the format."""

    def __init__(self, what: Tracked) -> None:
        writers = importlib.import_module("torch.utils.tensorboard")
        self._writer = writers.SummaryWriter(log_dir=str(what.folder / "tensorboard"))

    def log(self, point: Point) -> None:
        for name, value in point.values.items():
            self._writer.add_scalar(name, value, point.at)

    def close(self) -> None:
        self._writer.close()


class _HostedRun:
    """A run in Weights & Biases, or in Trackio, which has the same interface."""

    def __init__(self, module: Any, settings: dict[str, Any]) -> None:
        self._run = module.init(**settings)
        if hasattr(self._run, "define_metric"):
            self._run.define_metric("*", step_metric="round")
            self._run.define_metric("step_done/*", step_metric="local_step")

    def log(self, point: Point) -> None:
        self._run.log({point.axis: point.at, **point.values})

    def close(self) -> None:
        self._run.finish()
