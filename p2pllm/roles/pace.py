"""The pace of a local epoch: when it is about to end, and whether it would end too late."""

import time

from p2pllm.config.run import RunConfig
from p2pllm.events import StepDone
from p2pllm.swarm.swarm import Swarm


class Pace:
    """Of one local epoch, which begins now."""

    def __init__(self, swarm: Swarm, run: RunConfig) -> None:
        self._swarm, self._seconds = swarm, run.training.local.seconds
        # With overlap the average travels while training goes on: nobody waits for the lines.
        self._tells = not run.averaging.overlap
        self._margin = 2 * swarm.timeouts.heartbeat
        self._began = self._stepped_at = time.monotonic()
        self.is_late = False  # with another step the group would close without us

    def step(self, done: StepDone) -> None:
        """A step is done: tell the swarm when the last one will be."""
        now = time.monotonic()
        took, elapsed, self._stepped_at = now - self._stepped_at, now - self._began, now
        # What we have is worth more now than all of it in a later round.
        self.is_late = self._swarm.closes_in() < took + self._margin
        if done.steps is None:
            left = (self._seconds or 0.0) - elapsed
        else:
            left = elapsed / done.step * (done.steps - done.step)
        if left > 0 and self._tells:
            self._swarm.expect_end(left)
