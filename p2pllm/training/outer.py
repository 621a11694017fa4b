"""The outer optimizer: from the averaged delta of a round to the adapter of the next.

Its state is one flat array: the adapter's values, and behind them, with momentum, as many values of
momentum. Peers hash, hand on and check the whole array, so a late joiner gets the momentum too.
"""

import numpy as np

from p2pllm.config.run import AveragingConfig
from p2pllm.model.adapter import Values


class OuterOptimizer:
    """`mean` adds the averaged delta; `nesterov` is DiLoCo's (Douillard et al. 2023,
    arXiv 2311.08105): SGD with Nesterov momentum, the averaged delta being minus the gradient."""

    def __init__(self, rules: AveragingConfig, size: int) -> None:
        """size: how many values the adapter has."""
        self._has_momentum = rules.outer == "nesterov"
        self._rate, self._momentum = np.float32(rules.outer_lr), np.float32(rules.outer_momentum)
        self._size = size

    @property
    def state_size(self) -> int:
        return 2 * self._size if self._has_momentum else self._size

    def start(self, values: Values) -> Values:
        """The state of round 0, shape (state_size,)."""
        if not self._has_momentum:
            return values
        return np.concatenate([values, np.zeros_like(values)])

    def values(self, state: Values) -> Values:
        """The adapter's values in a state."""
        return state[: self._size]

    def step(self, state: Values, delta: Values, part: slice) -> None:
        """Make it the state of the next round, in which only `part` of the values, and of their
        momentum, has changed. Elementwise float32 only, hence the same on every peer."""
        values, momentum = state[: self._size][part], state[self._size :][part]
        if self._has_momentum:
            momentum[:] = self._momentum * momentum + delta
            delta = self._rate * (delta + self._momentum * momentum)
        values += delta
