"""A trainer's work on its way into an average: trained, perhaps ahead of its time; offered; carried
into a later round where its own was missed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from p2pllm.coverage import Span, merged
from p2pllm.events import StepDone
from p2pllm.model.adapter import Values
from p2pllm.roles.leases import Rows
from p2pllm.swarm.group import Group
from p2pllm.swarm.rounds import Anchor, SwarmView
from p2pllm.training.learner import Work


class LocalTraining(Protocol):
    """Who does the local epochs: our `Learner`, or somebody's script."""

    @property
    def size(self) -> int:
        """How many values the adapter has."""

    def part(self, round: int) -> slice:
        """Which of the values are trained in a round."""

    def values(self) -> Values:
        """The local adapter, (size,)."""

    def adopt(self, values: Values) -> None:
        """Go on from other values."""

    def train(
        self,
        round: int,
        on_step: Callable[[StepDone], None],
        stop: Callable[[], bool],
        begun: Work | None = None,
    ) -> Work:
        """One local epoch of a round, or what is left of it after `begun`. It ends within a step
        once `stop` says so."""


@dataclass(frozen=True)
class Offer:
    """Local work that has not been averaged: the delta of `part` of the adapter's values, and the
    samples behind it."""

    delta: Values
    samples: float
    part: slice
    spans: tuple[Span, ...] = ()  # of the run's rows

    def joined_with(self, other: "Offer", discount: float) -> "Offer":
        """The mean of both, weighted by samples, those of `other` discounted."""
        samples = self.samples + discount * other.samples
        share = np.float32(self.samples / samples)
        delta = share * self.delta + (1 - share) * other.delta
        return Offer(delta, samples, self.part, self.spans)


class LocalWork:
    """All that one trainer has learnt and the others have not got yet."""

    def __init__(self, learner: LocalTraining, rows: Rows, discount: float) -> None:
        """discount: by which work counts that comes into a later round; 0: it is lost."""
        self._learner, self._rows, self._discount = learner, rows, discount
        self._round, self._anchor = 0, learner.values()
        self.finished: Work | None = None  # a local epoch on the anchor
        self._spans: tuple[Span, ...] = ()  # the rows behind it
        self._offered: Offer | None = None  # what the others get of it, while they may
        self._ahead: Work | None = None  # of the next local epoch, done while that is under way
        self._ahead_from: Values | None = None  # the local adapter (size,) as it was offered
        self._carried: Offer | None = None  # work of a round that was missed

    def start_from(self, round: int, anchor: Values) -> None:
        """A round begins with this adapter, (size,). What was offered before is settled."""
        self._round, self._anchor = round, anchor
        self.finished = self._offered = self._ahead_from = None
        self._learner.adopt(anchor)

    def train(
        self,
        on_step: Callable[[StepDone], None],
        stop: Callable[[], bool],
        enough: Callable[[], bool],
    ) -> bool:
        """A local epoch, whatever was done ahead included, or what there is of it once `enough`
        says so. Whether it is finished."""
        work = self._learner.train(self._round, on_step, lambda: stop() or enough(), self._ahead)
        self._ahead = None
        if stop() or not work.samples:
            return False
        self.finished, self._spans = work, self._rows.take()
        return True

    def train_ahead(self, on_step: Callable[[StepDone], None], stop: Callable[[], bool]) -> None:
        """Go on with the next local epoch, once this one's work is offered."""
        if self._ahead_from is None:
            self._ahead_from = self._learner.values()
        self._ahead = self._learner.train(self._round + 1, on_step, stop, self._ahead)

    def offer(self) -> Offer:
        """For this round's average: the same one in each attempt at it."""
        if self._offered is None:
            self._offered = self._make_offer()
        return self._offered

    def settle(self, group: Group, part: slice) -> Values | None:
        """The offer is in the group's average. Returns what was learnt ahead since, (size,), where
        there is anything and it may stay."""
        if not self._rows.commit(group):
            self._ahead = None
        if self._carried is not None:  # its rows are accounted for, also where it waits
            self._carried = None if self._carried.part == part else replace(self._carried, spans=())
        if self._ahead is None or self._ahead_from is None:
            return None
        return self._learner.values() - self._ahead_from

    def carry(self, agreed: Anchor, view: SwarmView) -> None:
        """Before another adapter is taken over: keep our work for the next round, unless it is part
        of that adapter already, or other trainers have used its rows meanwhile."""
        offer = self._carried
        if self.finished is not None:
            offer = self._make_offer()
        self._ahead = None
        self._rows.take()  # what was done ahead is lost where it is not part of the offer
        if not self._discount:
            offer = None
        is_open = self._rows.follow(agreed, view, offer.spans if offer else ())
        self._carried = offer if is_open else None

    def give_way(self, view: SwarmView) -> bool:
        """When another trainer has leased the same rows and goes on with them, take others. Whether
        work was lost."""
        if not self._rows.is_lost(view):
            return False
        self._rows.give_up()
        if not (self.finished or self._ahead or self._carried):
            return False
        self.finished = self._offered = self._ahead = self._ahead_from = self._carried = None
        self._learner.adopt(self._anchor)
        return True

    def _make_offer(self) -> Offer:
        assert self.finished is not None
        samples, part = self.finished.samples, self._learner.part(self._round)
        if self._ahead is not None and self._learner.part(self._round + 1) == part:
            samples += self._ahead.samples
        delta = self._learner.values()[part]
        delta -= self._anchor[part]
        waiting = self._carried.spans if self._carried is not None else ()
        spans = merged([*waiting, *self._spans, *self._rows.take()])
        fresh = Offer(delta, float(samples), part, spans)
        if self._carried is None or self._carried.part != part:
            return fresh  # work on the other half waits for a round that averages it
        return fresh.joined_with(self._carried, self._discount)
