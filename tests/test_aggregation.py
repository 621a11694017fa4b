"""The error of averaging A and B apart: by hand, and none where one of them is common."""

import numpy as np
import pytest

from p2pllm.training.aggregation import aggregation_error

WEIGHTS = (1.0, 3.0, 2.0)


def some_peers(adapter, part):
    """Three peers that share everything but `part`."""
    common = np.random.default_rng(0).standard_normal(adapter.size).astype(np.float32)
    peers = []
    for seed in (1, 2, 3):
        values = common.copy()
        mine = np.random.default_rng(seed).standard_normal(adapter.size)
        values[part] = mine.astype(np.float32)[part]
        peers.append(values)
    return peers


def products(adapter, values):
    """Every B @ A, in full."""
    tensors = adapter.tensors(np.asarray(values, np.float32))
    pairs = [(tensors[n.replace("_A.", "_B.")], t) for n, t in tensors.items() if "lora_A" in n]
    return np.stack([b.astype(np.float64) @ a.astype(np.float64) for b, a in pairs])


def test_the_error_is_that_of_the_products_written_out(tiny_adapter):
    peers = some_peers(tiny_adapter, slice(None))
    of_products = np.average([products(tiny_adapter, p) for p in peers], axis=0, weights=WEIGHTS)
    of_factors = products(tiny_adapter, np.average(peers, axis=0, weights=WEIGHTS))
    expected = np.linalg.norm(of_products - of_factors) / np.linalg.norm(of_products)
    assert expected > 0.1
    assert aggregation_error(tiny_adapter, peers, WEIGHTS) == pytest.approx(expected, rel=1e-4)


def test_where_peers_share_one_half_the_average_is_exact(tiny_adapter):
    middle = tiny_adapter.size_of_a
    for part in (slice(middle, None), slice(0, middle)):
        peers = some_peers(tiny_adapter, part)
        assert aggregation_error(tiny_adapter, peers, WEIGHTS) < 1e-12
        mean = np.average(peers, axis=0, weights=WEIGHTS)
        np.testing.assert_allclose(
            products(tiny_adapter, mean),
            np.average([products(tiny_adapter, p) for p in peers], axis=0, weights=WEIGHTS),
            atol=1e-5,
        )


def test_equal_peers_and_untrained_ones_have_no_error(tiny_adapter):
    first = tiny_adapter.values()  # B is zero
    assert aggregation_error(tiny_adapter, [first, first], (1, 1)) == 0
    [one, *_] = some_peers(tiny_adapter, slice(None))
    assert aggregation_error(tiny_adapter, [one, one], (1, 2)) == pytest.approx(0, abs=1e-12)
