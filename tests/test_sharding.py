import subprocess
import sys
from itertools import chain, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pllm.data.sharding import Sampler, permutation, shard_of

SEEDS = st.integers(0, 2**31 - 1)


@given(rows=st.integers(0, 300), shards=st.integers(1, 40), seed=SEEDS)
def test_shards_are_disjoint_and_together_everything(rows, shards, seed):
    parts = [shard_of(rows, shards, shard, seed) for shard in range(shards)]
    assert sorted(chain(*parts)) == list(range(rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_shards_are_the_same_on_every_machine_and_python():
    # Frozen: peers with other versions must get the very same rows.
    assert shard_of(12, 3, 0, seed=1234) == [5, 7, 6, 10]
    assert permutation(8, "pass", 7, 0) == [7, 2, 0, 3, 4, 5, 6, 1]


def test_another_seed_makes_other_shards():
    assert shard_of(100, 4, 0, seed=1) != shard_of(100, 4, 0, seed=2)


@pytest.mark.parametrize("shard", [-1, 4])
def test_a_shard_that_does_not_exist_is_refused(shard):
    with pytest.raises(ValueError, match=r"not one of 0\.\.3"):
        shard_of(10, 4, shard, seed=0)


@given(
    rows=st.lists(st.integers(0, 10**6), min_size=1, max_size=50, unique=True),
    batch_size=st.integers(1, 70),
    seed=SEEDS,
)
def test_every_row_comes_once_per_pass_whatever_the_batch_size(rows, batch_size, seed):
    sampler = Sampler(rows, batch_size, seed)
    batches = list(islice(sampler, 3 * len(rows) // batch_size + 1))
    assert {len(batch) for batch in batches} == {batch_size}
    stream = list(chain(*batches))
    for start in range(0, len(stream) - len(rows) + 1, len(rows)):
        assert sorted(stream[start : start + len(rows)]) == sorted(rows)
    assert sampler.pass_number == len(stream) // len(rows)


def test_each_pass_has_a_fresh_order():
    sampler = Sampler(range(20), batch_size=20, seed=3)
    first, second = next(sampler), next(sampler)
    assert first != second
    assert sorted(first) == sorted(second)


def test_the_position_outlives_a_local_epoch():
    sampler = Sampler(range(10), batch_size=2, seed=0)
    one_epoch, next_epoch = list(islice(sampler, 2)), list(islice(sampler, 3))
    assert sorted(chain(*one_epoch, *next_epoch)) == list(range(10))


def test_two_samplers_with_one_seed_agree():
    ours, theirs = Sampler(range(9), 4, seed=5), Sampler(range(9), 4, seed=5)
    assert list(islice(ours, 10)) == list(islice(theirs, 10))


def test_a_switch_starts_over_with_the_other_rows():
    sampler = Sampler(range(10), batch_size=4, seed=0)
    next(sampler)
    sampler.switch([100, 101, 102])
    assert (len(sampler), sampler.pass_number) == (3, 0)
    assert set(next(sampler)) == {100, 101, 102}


def test_a_shard_claimed_again_has_a_new_order():
    sampler = Sampler(range(20), batch_size=20, seed=0)
    before = next(sampler)
    sampler.switch(range(20))
    assert next(sampler) != before


@pytest.mark.parametrize(("rows", "batch_size"), [([], 1), ([1], 0)])
def test_a_sampler_without_rows_or_batch_is_refused(rows, batch_size):
    with pytest.raises(ValueError, match="at least one row"):
        Sampler(rows, batch_size, seed=0)


def test_sharding_needs_neither_torch_nor_datasets():
    code = "import sys, p2pllm.data.sharding; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "datasets", "numpy"}.isdisjoint(done.stdout.split())
