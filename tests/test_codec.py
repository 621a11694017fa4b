"""How values travel, and how the work of a group is divided."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from p2pllm.config.run import AveragingConfig
from p2pllm.swarm.codec import CHUNK, chunks, decode, encode, encoded_size
from p2pllm.swarm.group import Group, Member, _relative_lines, divide
from p2pllm.swarm.rounds import Anchor

floats = arrays(np.float32, st.integers(0, 300), elements=st.floats(-(2.0**99), 2.0**99, width=32))


@given(floats, st.sampled_from(["none", "fp16", "int8"]))
def test_encoded_sizes_are_known_beforehand(values, compression):
    assert len(encode(values, compression)) == encoded_size(values.size, compression)


@given(floats)
def test_uncompressed_values_come_back_bit_for_bit(values):
    np.testing.assert_array_equal(decode(encode(values, "none"), "none"), values)


@given(floats)
def test_fp16_is_within_half_a_thousandth_of_the_largest(values):
    back = decode(encode(values, "fp16"), "fp16")
    largest = np.max(np.abs(values), initial=0.0)
    np.testing.assert_allclose(back, values, atol=float(largest) * 5e-4 + 1e-37)


def test_tiny_deltas_keep_their_precision_in_fp16():
    values = np.array([1e-7, -3e-8, 2.5e-9], np.float32)
    np.testing.assert_allclose(decode(encode(values, "fp16"), "fp16"), values, rtol=1e-3)


def test_fp16_on_the_wire_is_the_nearest_float16():
    every = np.arange(0x3C01, dtype=np.uint16).view(np.float16).astype(np.float32)  # 0 to 1
    between = (every[:-1] + every[1:]) / 2  # ties go to the even one
    values = np.concatenate([every, between, -every, -between])
    frame = encode(values, "fp16")
    halves = np.frombuffer(frame, "<f2", offset=4)
    np.testing.assert_array_equal(halves, values.astype(np.float16))
    np.testing.assert_array_equal(decode(frame, "fp16"), halves.astype(np.float32))


def test_not_a_number_stays_visible():
    values = np.array([1.0, np.nan, 2.0], np.float32)
    assert not np.isfinite(decode(encode(values, "fp16"), "fp16")).all()


@given(st.integers(0, 5 * CHUNK))
def test_chunks_cover_everything_once(size):
    assert sum(c.stop - c.start for c in chunks(size)) == size


def members(*dialable):
    return [Member(str(i), 1.0, 1.0, d) for i, d in enumerate(dialable)]


@given(st.integers(1, 100 * CHUNK), st.lists(st.booleans(), min_size=1, max_size=16))
def test_parts_add_up_and_go_to_those_that_can_be_dialled(size, dialable):
    parts = divide(size, members(*dialable))
    assert sum(parts) == size
    assert all(n >= 0 for n in parts)
    if any(dialable):
        assert all(d or not n for d, n in zip(dialable, parts, strict=True))


def with_lines(*uplinks):
    return [Member(str(i), 1.0, 1.0, uplink=float(u)) for i, u in enumerate(uplinks)]


@pytest.mark.parametrize(
    "uplinks, fractions",
    [
        ((0, 0, 0, 0), (1 / 4, 1 / 4, 1 / 4, 1 / 4)),  # nothing is known yet
        ((9e6, 12e6, 10e6, 8e6), (1 / 4, 1 / 4, 1 / 4, 1 / 4)),  # a measurement's noise
        ((1e7, 1e7, 1e7, 5e5), (1 / 3, 1 / 3, 1 / 3, 0)),  # too slow for more than its own delta
        ((1e7, 1e7, 0, 5e5), (1 / 3, 1 / 3, 1 / 3, 0)),  # a newcomer counts as one of the usual
        ((4e7, 1e7, 1e7), (1, 0, 0)),  # T = 2/4: the two others are just done with their own
        ((1e5, 1e7), (1 / 2, 1 / 2)),  # of two, both send all values once in any case
    ],
)
def test_parts_follow_the_members_lines(uplinks, fractions):
    size = 12 * 100 * CHUNK
    parts = divide(size, with_lines(*uplinks))
    assert [n / size for n in parts] == pytest.approx(fractions, abs=1e-3)


@given(st.lists(st.floats(1, 1e9) | st.just(0.0), min_size=3, max_size=16))
def test_no_line_is_busy_for_longer_than_with_equal_parts(uplinks):
    size, ms = 100 * CHUNK, with_lines(*uplinks)
    lines = _relative_lines(ms)

    def time(parts):
        needed = [size + (len(ms) - 2) * part for part in parts]
        return max(n / line for n, line in zip(needed, lines, strict=True))

    parts = divide(size, ms)
    assert sum(parts) == size
    assert min(parts) >= 0
    assert time(parts) <= time([size / len(ms)] * len(ms)) * 1.1 + 1  # parts are whole chunks


def group(*stakes, clip=10.0):
    ms = tuple(Member(str(i), w, n) for i, (w, n) in enumerate(stakes))
    return Group("g", Anchor(0, "a"), ms, divide(100, ms), "fp16", "clip", clip, 0.0, 9.0, 0.0, {})


def test_shares_are_by_weight_and_a_loud_member_is_clipped_to_the_median():
    loud = group((1.0, 1.0), (1.0, 1.0), (2.0, 40.0))
    assert loud.shares()["0"] == 0.25
    assert loud.shares()["2"] == pytest.approx(0.5 * 10 / 40)
    assert loud.out_of_proportion() == {"2": "norm 40 times the median, cut down"}


def test_a_weight_out_of_proportion_counts_as_a_multiple_of_the_median():
    shares = group((1.0, 1.0), (1.0, 1.0), (1e8, 1.0)).shares()
    assert shares["2"] == pytest.approx(10 / 12)


def test_a_weight_beyond_what_its_speed_allows_is_cut_down():
    slow, honest = Member("0", 100.0, 1.0, speed=1.0), Member("1", 60.0, 1.0, speed=10.0)
    made = dataclasses.replace(group((1.0, 1.0), (1.0, 1.0)), members=(slow, honest), elapsed=10.0)
    assert made.shares()["0"] == pytest.approx(20 / 80)  # twice its ten samples
    assert "more than its speed allows" in made.out_of_proportion()["0"]
    assert "1" not in made.out_of_proportion()


@given(st.lists(st.tuples(st.floats(0.1, 1e6), st.floats(0, 1e6)), min_size=1, max_size=8))
def test_shares_never_add_up_to_more_than_one(stakes):
    assert sum(group(*stakes).shares().values()) <= 1 + 1e-9


def test_a_group_survives_the_way_to_its_members():
    original = group((1.0, 2.0), (3.0, 4.0))
    assert Group.from_message(original.as_message()) == original


@pytest.mark.parametrize(
    "weight, norm", [(float("nan"), 1.0), (-1.0, 1.0), (0.0, 1.0), (1e30, 1.0), (1.0, -1.0)]
)
def test_a_member_whose_numbers_are_not_sane_makes_no_group(weight, norm):
    message = group((1.0, 1.0)).as_message()
    message["members"][0].update(weight=weight, norm=norm)
    with pytest.raises(ValueError, match="sane"):
        Group.from_message(message)


def test_a_member_refuses_a_group_that_is_not_as_agreed():
    ours = group((1.0, 1.0), (1.0, 1.0))
    mine = ours.members[0]
    rules = AveragingConfig(clip=10.0)
    assert ours.problem_for(mine, 100, rules) == ""
    assert "our own entry" in ours.problem_for(Member("0", 2.0, 1.0), 100, rules)
    assert "add up" in ours.problem_for(mine, 101, rules)
    assert "rules" in ours.problem_for(mine, 100, AveragingConfig(compression="none", clip=10.0))
