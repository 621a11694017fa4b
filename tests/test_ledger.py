"""The story of a round, from the ledger on disk."""

import json

import pytest

from p2pllm.errors import LedgerMissing, RoundUnknown
from p2pllm.ledger import find_ledger, read_ledger, story

COMMITTED = {
    "event": "round_committed",
    "time": 1_800_000_000.0,
    "round": 17,
    "digest": "abcdef0123",
    "peers": ["bob", "ann"],
    "samples": 40,
    "loss": 3.25,
    "tokens_per_second": 100.0,
    "seconds_training": 9.0,
    "seconds_waiting": 3.2,
    "seconds_averaging": 0.4,
    "bytes_sent": 12345,
    "bytes_received": 12000,
    "deadline": 30.0,
    "left_out": {"cat": "not ready after 3.2 s"},
    "cut_down": {"dan": "norm 40 times the median, cut down"},
}
MISSED = {
    "event": "round_missed",
    "time": 1_800_000_000.0,
    "round": 17,
    "reason": "died while sending",
    "culprits": ["cat"],
}


def test_a_round_is_told_with_who_came_who_did_not_and_why():
    told = "\n".join(story([MISSED, COMMITTED], 17))
    assert "died while sending (because of cat)" in told
    assert "left out: cat, not ready after 3.2 s" in told
    assert "cut down: dan, norm 40 times the median" in told
    assert "averaged with ann, bob in 0.40 s, 12,345 bytes sent" in told
    assert "adapter abcdef01 of round 18" in told


def test_an_unknown_round_is_a_letter_that_names_those_there_are():
    with pytest.raises(RoundUnknown, match="17"):
        story([COMMITTED], 3)


def test_the_newest_ledger_below_a_folder_is_found_and_a_torn_line_is_passed_over(tmp_path):
    folder = tmp_path / "demo-1" / "ann"
    folder.mkdir(parents=True)
    (folder / "ledger.jsonl").write_text(json.dumps(COMMITTED) + '\n{"event": "rou')
    assert find_ledger(tmp_path) == find_ledger(folder)
    assert read_ledger(find_ledger(tmp_path)) == [COMMITTED]


def test_no_ledger_is_a_letter(tmp_path):
    with pytest.raises(LedgerMissing, match="p2pllm rounds FOLDER"):
        find_ledger(tmp_path)
