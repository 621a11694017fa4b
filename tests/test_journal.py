"""What a peer keeps on disk of what happened to it."""

import json
from io import FileIO
from threading import Thread

from p2pllm.events import EvaluationSeen, RoundMissed, StepDone
from p2pllm.journal import Journal, follow

STEP = StepDone(round=1, step=2, steps=3, loss=float("nan"), learning_rate=0.1, tokens_per_second=9)
MISSED = RoundMissed(round=1, reason="died while sending", culprits=["cat"])


def written(folder, *events):
    journal = Journal(folder)
    for event in events:
        journal(event)
    journal.close()


def test_metrics_have_everything_and_the_ledger_has_the_rounds(tmp_path):
    written(tmp_path, STEP, MISSED, EvaluationSeen(round=1, loss=3.0))
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    ledger = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert [row["event"] for row in metrics] == ["step_done", "round_missed", "evaluation_seen"]
    assert metrics[0]["loss"] is None  # JSON has no NaN
    assert [row["event"] for row in ledger] == ["round_missed"]


def test_a_restarted_peer_goes_on_below_a_line_that_was_torn(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"event": "torn')
    written(tmp_path, MISSED)
    rows = next(follow(tmp_path / "metrics.jsonl"))
    assert [row["event"] for row in rows] == ["round_missed"]


def test_a_full_disk_never_stops_the_training(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("where the folder should be")
    written(blocked, STEP, STEP)
    assert "rows are lost" in caplog.text


class FillingUp(FileIO):
    """A file on a disk with so many bytes left."""

    room = 10**9

    def write(self, line):
        return super().write(bytes(line)[: self.room])


def test_a_row_that_fitted_in_part_costs_only_itself(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("p2pllm.journal.FileIO", FillingUp)
    journal = Journal(tmp_path)
    journal(MISSED)
    with monkeypatch.context() as patch:
        patch.setattr(FillingUp, "room", 10)
        journal(STEP)
        journal(STEP)
    journal(MISSED)
    journal.close()
    rows = next(follow(tmp_path / "metrics.jsonl"))
    assert [row["event"] for row in rows] == ["round_missed", "round_missed"]
    assert caplog.text.count("rows are lost:") == 1
    assert "2 rows are lost" in caplog.text


def test_rows_of_several_threads_do_not_mix(tmp_path):
    journal = Journal(tmp_path)

    def write():
        for _ in range(50):
            journal(MISSED)

    threads = [Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.close()
    assert len(next(follow(tmp_path / "ledger.jsonl"))) == 200


def test_following_yields_each_complete_row_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = follow(path)
    assert next(rows) == []
    path.write_text('{"event": "a"}\n{"event"')
    assert next(rows) == [{"event": "a"}]
    with path.open("a") as file:
        file.write(': "b"}\n')
    assert next(rows) == [{"event": "b"}]
