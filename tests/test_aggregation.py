"""The error of averaging A and B apart: by hand, and none where one of them is common; and what
sketches of the adapters tell of it."""

import numpy as np
import pytest

from p2pllm.swarm.records import Sketch
from p2pllm.training.aggregation import (
    SKETCH_SIZE,
    Change,
    aggregation_error,
    credible,
    estimated_error,
    sketch,
)

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


# ---- sketches


def estimate(adapter, peers, round, weights=WEIGHTS):
    """As in a swarm: by way of the records."""
    average = np.average(peers, axis=0, weights=weights).astype(np.float32)
    nothing = np.zeros_like(average)
    told = [travelled(sketch(adapter, Change(nothing, peer, average), 7, round)) for peer in peers]
    return estimated_error(told, weights)


def travelled(numbers):
    unpacked = Sketch.of(0.5, 3, numbers).unpacked(SKETCH_SIZE)
    assert unpacked is not None
    return unpacked


def test_sketches_estimate_the_error_within_their_standard_error(tiny_adapter):
    """As bad as can be: random adapters of rank 4, in few modules."""
    peers = some_peers(tiny_adapter, slice(None))
    exact = aggregation_error(tiny_adapter, peers, WEIGHTS)
    modules = sum(".lora_A." in name for name in tiny_adapter.shapes)
    promised = (2 * (1 / 512 + 1 / (16 * modules))) ** 0.5  # of a quotient of two norms
    off = [estimate(tiny_adapter, peers, round) / exact - 1 for round in range(100)]
    assert abs(np.mean(off)) < 3 * promised / 10
    assert promised / 4 < np.std(off) < promised
    assert len(set(off)) == 100  # each round has projections of its own


def test_a_small_error_is_not_lost_in_rounding(tiny_adapter):
    [one, *_] = some_peers(tiny_adapter, slice(None))
    noise = [np.random.default_rng(seed).standard_normal(one.size) for seed in (5, 6, 7)]
    peers = [(one * (1 + 1e-3 * n)).astype(np.float32) for n in noise]
    exact = aggregation_error(tiny_adapter, peers, WEIGHTS)
    assert 0 < exact < 1e-5
    assert estimate(tiny_adapter, peers, 1) == pytest.approx(exact, rel=0.5)


def test_where_peers_share_one_half_sketches_say_exactly_none(tiny_adapter):
    middle = tiny_adapter.size_of_a
    for part in (slice(middle, None), slice(0, middle)):
        peers = some_peers(tiny_adapter, part)
        [common, *_] = peers
        average = np.average(peers, axis=0, weights=WEIGHTS).astype(np.float32)
        average[: part.start] = common[: part.start]  # a round leaves the other half alone
        average[part.stop :] = common[part.stop :]
        nothing = np.zeros_like(common)
        told = [sketch(tiny_adapter, Change(nothing, peer, average), 7, 1) for peer in peers]
        assert estimated_error(told, WEIGHTS) == 0
        assert np.linalg.norm(told[0]) > 1


def test_untrained_peers_have_no_error(tiny_adapter):
    first = tiny_adapter.values()  # B is zero
    told = sketch(tiny_adapter, Change(np.zeros_like(first), first, first), 7, 0)
    assert estimated_error([told, told], (1, 1)) == 0


def test_a_diverged_adapter_is_sketched_without_a_word(tiny_adapter):
    huge = np.full(tiny_adapter.size, 1e30, np.float32)
    told = sketch(tiny_adapter, Change(huge, huge, -huge), 7, 0)
    assert not np.isfinite(told).all()
    assert credible({"ann": told}) == {}


@pytest.mark.parametrize("at", [0, SKETCH_SIZE - 1])
@pytest.mark.parametrize("lie", [np.nan, np.inf, 3e38])
def test_sketches_out_of_all_proportion_do_not_count(at, lie):
    honest = np.random.default_rng(1).standard_normal((3, SKETCH_SIZE)).astype(np.float32)
    liar = honest[0].copy()
    liar[at] = lie
    said = dict(zip("abc", honest, strict=True))
    assert set(credible({**said, "liar": liar})) == {"a", "b", "c"}
    assert set(credible({**said, "short": honest[0][1:]})) == {"a", "b", "c"}
