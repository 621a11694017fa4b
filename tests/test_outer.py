"""The outer optimizer: the same step on every peer, and DiLoCo's when asked for."""

import numpy as np
import torch

from p2pllm.config.run import AveragingConfig
from p2pllm.training.outer import OuterOptimizer

DELTAS = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32)
FIRST = np.random.default_rng(1).normal(size=40).astype(np.float32)


def test_the_mean_adds_the_averaged_delta():
    outer = OuterOptimizer(AveragingConfig(), 40)
    state = outer.start(FIRST)
    assert state.size == outer.state_size == 40
    np.testing.assert_array_equal(outer.step(state, DELTAS[0]), FIRST + DELTAS[0])


def test_nesterov_is_torchs_own():
    rules = AveragingConfig(outer="nesterov", outer_lr=0.7, outer_momentum=0.9)
    outer = OuterOptimizer(rules, 40)
    state = outer.start(FIRST)
    parameter = torch.nn.Parameter(torch.from_numpy(FIRST.copy()))
    sgd = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    for delta in DELTAS:
        state = outer.step(state, delta)
        parameter.grad = -torch.from_numpy(delta)
        sgd.step()
    assert state.size == outer.state_size == 80
    np.testing.assert_allclose(
        outer.values(state), parameter.detach().numpy(), rtol=1e-5, atol=1e-6
    )
