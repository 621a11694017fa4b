"""The aggregation error of a round: each member sketches its part of it and says so in its record,
and the aggregator adds up what the members say.
"""

import statistics
import threading
import time

import numpy as np

from p2pllm.events import AggregationMeasured, Events
from p2pllm.model.adapter import Adapter, Values
from p2pllm.roles.local_work import Offer
from p2pllm.swarm.node import Averaged
from p2pllm.swarm.records import Sketch
from p2pllm.swarm.rounds import Anchor, SwarmView
from p2pllm.swarm.swarm import Swarm
from p2pllm.training.aggregation import SKETCH_SIZE, Change, credible, estimated_error, sketch

_PATIENCE = 3.0  # seconds for the records of a round's members


class OwnSketch:
    """A trainer's part in the error of each round, made while its next local epoch goes on."""

    def __init__(self, swarm: Swarm, adapter: Adapter, seed: int) -> None:
        self._swarm, self._adapter, self._seed = swarm, adapter, seed
        self._at_work: threading.Thread | None = None

    def begin(self, round: int, values: Values, offer: Offer, outcome: Averaged) -> None:
        """round: the one that the outcome made. values: the adapter, (size,), before it."""
        if len(outcome.group.members) > 1:
            told = (round, values, offer, outcome)
            self._at_work = threading.Thread(target=self._make, args=told, daemon=True)
            self._at_work.start()

    def finish(self) -> None:
        """Before another adapter is held: what we say of one must not be taken for the other's."""
        if self._at_work is not None:
            self._at_work.join()
            self._at_work = None

    def _make(self, round: int, values: Values, offer: Offer, outcome: Averaged) -> None:
        """Of what we offered as it counted, cut down where it was."""
        group, me = outcome.group, self._swarm.me
        scale = np.float32(group.scales()[me])
        counted = offer.delta if scale == 1 else scale * offer.delta
        own, average = (_whole(part, offer.part, values) for part in (counted, outcome.delta))
        numbers = sketch(self._adapter, Change(values, own, average), self._seed, round)
        said = Sketch.of(group.weights()[me], len(group.members), numbers)
        self._swarm.announce(sketch=said)


class Sketches:
    """Those of the round that made one anchor, and then of the next. Records come one after the
    other, so it waits a little for all of them; and a round that is over before all have come is
    reported from those that have."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._anchor: Anchor | None = None
        self._said: dict[str, tuple[str, Sketch]] = {}  # by peer id: its name, and what it says
        self._until = 0.0  # by the monotonic clock
        self._is_open = False

    def are_complete(self, anchor: Anchor, view: SwarmView) -> bool:
        """Take in what the view has on this anchor. True once there is nothing to wait for: the
        error has been reported, or nobody who could says anything of it."""
        if anchor != self._anchor:
            was_overtaken = self._is_open
            self._report()
            self._anchor, self._said, self._is_open = anchor, {}, True
            # Where rounds are that short, to wait for each would leave no time to evaluate any.
            self._until = time.monotonic() + (0.0 if was_overtaken else _PATIENCE)
        if not self._is_open:
            return True
        holders = [p for p in view.trainers if Anchor(p.round, p.digest) == anchor]
        self._said |= {p.peer: (p.name, p.sketch) for p in holders if p.sketch is not None}
        # Of a round that only one has made, or that nobody has, there is nothing to be said.
        awaited = self._members if self._said else len(holders) if anchor.round else 0
        if len(self._said) < awaited > 1 and time.monotonic() < self._until:
            return False
        self._report()
        return True

    @property
    def _members(self) -> int:
        """Of the round, as most of them say."""
        return statistics.median_low(s.members for _, s in self._said.values())

    def _report(self) -> None:
        """Once for each anchor, and only where two or more have told."""
        was_open, self._is_open = self._is_open, False
        if not was_open or self._anchor is None:
            return
        unpacked = {p: s.unpacked(SKETCH_SIZE) for p, (_, s) in self._said.items()}
        read = credible({p: values for p, values in unpacked.items() if values is not None})
        if len(read) < 2:
            return
        error = estimated_error(list(read.values()), [self._said[p][1].weight for p in read])
        self._events.emit(
            AggregationMeasured(
                round=self._anchor.round,
                error=error,
                peers=sorted(self._said[p][0] for p in read),
                members=max(self._members, len(read)),
            )
        )


def _whole(delta: Values, part: slice, values: Values) -> Values:
    """A change of `part` of the values as a change of all, (size,)."""
    if delta.size == values.size:
        return delta
    whole = np.zeros_like(values)
    whole[part] = delta
    return whole
