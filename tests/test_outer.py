"""The outer optimizer: the same step on every peer, and DiLoCo's when asked for."""

import numpy as np
import torch

from p2pllm.config.run import AveragingConfig
from p2pllm.training.outer import OuterOptimizer

DELTAS = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32)
ALL = slice(0, 40)
FIRST = np.random.default_rng(1).normal(size=40).astype(np.float32)


def test_the_mean_adds_the_averaged_delta():
    outer = OuterOptimizer(AveragingConfig(), 40)
    state = outer.start(FIRST.copy())
    assert state.size == outer.state_size == 40
    outer.step(state, DELTAS[0], ALL)
    np.testing.assert_array_equal(state, FIRST + DELTAS[0])


def test_nesterov_is_torchs_own():
    rules = AveragingConfig(outer="nesterov", outer_lr=0.7, outer_momentum=0.9)
    outer = OuterOptimizer(rules, 40)
    state = outer.start(FIRST)
    parameter = torch.nn.Parameter(torch.from_numpy(FIRST.copy()))
    sgd = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    for delta in DELTAS:
        outer.step(state, delta, ALL)
        parameter.grad = -torch.from_numpy(delta)
        sgd.step()
    assert state.size == outer.state_size == 80
    np.testing.assert_allclose(
        outer.values(state), parameter.detach().numpy(), rtol=1e-5, atol=1e-6
    )


def test_each_half_keeps_its_own_momentum_while_the_other_is_averaged():
    """Two optimizers, one for each half, in turns."""
    rules = AveragingConfig(outer="nesterov")
    both, part = OuterOptimizer(rules, 40), (slice(0, 15), slice(15, 40))
    halves = [OuterOptimizer(rules, 15), OuterOptimizer(rules, 25)]
    whole = both.start(FIRST)
    states = [o.start(FIRST[p]) for o, p in zip(halves, part, strict=True)]
    for round, delta in enumerate(DELTAS):
        at = round % 2
        both.step(whole, delta[part[at]], part[at])
        halves[at].step(states[at], delta[part[at]], slice(None))
        values = [o.values(s) for o, s in zip(halves, states, strict=True)]
        np.testing.assert_array_equal(both.values(whole), np.concatenate(values))
