"""The demo's children: started with their own folders, and none outlives it."""

import signal
import subprocess
import sys
import time

import pytest

from p2pllm import demo
from p2pllm.demo import Child, _children


class FakeChild(Child):
    """A process that stands for a peer."""

    def __init__(self, code, folder):
        self.name, self.role, self.log = "fake", "trainer", folder / "fake.log"
        self._folder, self._rows = folder, None
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code], stdout=log, stderr=log, start_new_session=True
            )


def until_ready(child):
    while "ready" not in child.log.read_text():
        time.sleep(0.02)


def test_children_are_asked_to_leave_by_ctrl_c(tmp_path):
    code = "import time; print('ready', flush=True); time.sleep(60)"
    with _children() as start:
        child = start(FakeChild(code, tmp_path))
        until_ready(child)
    assert child.process.returncode == -signal.SIGINT or "KeyboardInterrupt" in child.last_words()


def test_a_child_that_will_not_leave_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_GOOD_BYE", (0.1, 0.1, 5.0))
    code = (
        "import signal, time\n"
        "for n in (signal.SIGINT, signal.SIGTERM): signal.signal(n, signal.SIG_IGN)\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    with pytest.raises(KeyboardInterrupt), _children() as start:
        child = start(FakeChild(code, tmp_path))
        until_ready(child)
        raise KeyboardInterrupt
    assert child.process.returncode == -signal.SIGKILL


def test_the_news_of_a_child_come_from_its_journal(tmp_path):
    child = FakeChild("pass", tmp_path)
    assert child.news() == []
    (tmp_path / "run-1" / "fake").mkdir(parents=True)
    (tmp_path / "run-1" / "fake" / "metrics.jsonl").write_text('{"event": "x"}\n')
    assert child.news() == [{"event": "x"}]
    assert child.news() == []
    child.process.wait(10)
