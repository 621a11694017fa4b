"""What happened, as values. The engine emits them; the screen, metrics.jsonl and tests subscribe.

An event is a frozen dataclass of plain JSON values. `Events` calls every subscriber in order, one
event at a time, in the thread that emits; a subscriber must not block.
"""

import dataclasses
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events."""

    time: float = field(default_factory=time.time)  # seconds since the epoch, this peer's clock

    def as_row(self) -> dict[str, Any]:
        """One flat JSON row; the class name in snake case is the `event` column."""
        name = "".join("_" + c.lower() if c.isupper() else c for c in type(self).__name__)
        return {"event": name.lstrip("_"), **dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Opened(Event):
    """The bootstrap peer holds the run's door open at these multiaddrs. Its first event."""

    run: str  # the run's id
    addresses: list[str]


@dataclass(frozen=True, kw_only=True)
class Joined(Event):
    """This peer is part of a run."""

    role: str
    run: str
    peer: str
    peer_id: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Working(Event):
    """Something that takes a while has begun: "loading the base model", "waiting for bob"."""

    doing: str


@dataclass(frozen=True, kw_only=True)
class ShardClaimed(Event):
    """This trainer works on one disjoint part of the run's rows."""

    shard: int
    shards: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class StepDone(Event):
    """One optimizer step."""

    round: int
    step: int
    steps: int | None  # planned in this local epoch; None when it is bounded by seconds
    loss: float
    learning_rate: float
    tokens_per_second: float


@dataclass(frozen=True, kw_only=True)
class RoundCommitted(Event):
    """This peer applied the average of a round and now holds the adapter `digest` of round + 1."""

    round: int
    digest: str
    peers: list[str]
    samples: int
    loss: float
    tokens_per_second: float
    seconds_training: float
    seconds_waiting: float
    seconds_averaging: float
    bytes_sent: int
    bytes_received: int
    deadline: float  # seconds that the group would have waited for the missing
    left_out: dict[str, str]  # who was expected and did not take part, and why
    cut_down: dict[str, str]  # whose contribution was out of proportion, and how


@dataclass(frozen=True, kw_only=True)
class RoundMissed(Event):
    """This peer could not complete a round; its local work is kept."""

    round: int
    reason: str
    culprits: list[str]


@dataclass(frozen=True, kw_only=True)
class CaughtUp(Event):
    """The committed adapter of a round was taken from other peers."""

    round: int
    digest: str
    donors: list[str]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Evaluated(Event):
    """The aggregator measured the held-out loss of a round's adapter (round 0: the base model)."""

    round: int
    digest: str
    loss: float
    rows: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class AggregationMeasured(Event):
    """The aggregator knows, of the round that made adapter `round`, how far the average of A and B
    apart is from the average of what they do: ||mean(BA) - mean(B)mean(A)|| / ||mean(BA)||."""

    round: int
    error: float  # an estimate: see p2pllm.training.aggregation
    peers: list[str]  # those whose sketches were read
    members: int  # how many averaged


@dataclass(frozen=True, kw_only=True)
class TrainerEvaluated(Event):
    """This trainer measured a held-out loss: of its own work before an average, or of the adapter
    after it. Both have the number of the adapter that the average makes."""

    round: int
    when: Literal["before", "after"]
    loss: float
    rows: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class EvaluationSeen(Event):
    """A signed result of the designated aggregator has arrived."""

    round: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved(Event):
    """An adapter lies complete on disk."""

    round: int
    path: str


@dataclass(frozen=True, kw_only=True)
class Trouble(Event):
    """Something failed that this peer can live with, in plain words."""

    what: str


@dataclass(frozen=True, kw_only=True)
class Finished(Event):
    """The run is over for this peer."""

    round: int
    digest: str
    path: str | None


class Events:
    """Where events go. Emitting to nobody is fine."""

    def __init__(self, *subscribers: Callable[[Event], None]) -> None:
        self._subscribers = list(subscribers)
        self._turn = threading.Lock()

    def subscribe(self, subscriber: Callable[[Event], None]) -> None:
        self._subscribers.append(subscriber)

    def emit(self, event: Event) -> None:
        with self._turn:
            for subscriber in self._subscribers:
                subscriber(event)
