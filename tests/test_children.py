"""The demo's child processes: asked to leave, made to leave, and read through their journals."""

import os
import signal
import sys
import threading
import time

import pytest

from p2pllm import children as children_module
from p2pllm.children import Child, Children, Interrupts

PYTHON = (sys.executable, "-S", "-E", "-c")  # quick to start


def child_of(code, folder):
    child = Child("fake", (*PYTHON, code), folder, os.environ)
    deadline = time.monotonic() + 10
    while "ready" not in child.log.read_text() and child.is_running and time.monotonic() < deadline:
        time.sleep(0.01)
    return child


def test_children_are_asked_to_leave_by_ctrl_c(tmp_path):
    code = "print('ready', flush=True)\nimport time; time.sleep(60)"
    with Interrupts() as interrupts, Children(interrupts) as children:
        children.add(child := child_of(code, tmp_path))
    assert child.status == -signal.SIGINT or "KeyboardInterrupt" in child.last_words()


STUBBORN = (
    "import signal, time\n"
    "for n in (signal.SIGINT, signal.SIGTERM): signal.signal(n, signal.SIG_IGN)\n"
    "print('ready', flush=True); time.sleep(60)"
)


def test_a_child_that_will_not_leave_is_killed(tmp_path, monkeypatch):
    patience = ((signal.SIGINT, 0.05), (signal.SIGTERM, 0.05), (signal.SIGKILL, 5.0))
    monkeypatch.setattr(children_module, "POLITENESS", patience)
    with pytest.raises(ZeroDivisionError), Children(Interrupts()) as children:
        children.add(child := child_of(STUBBORN, tmp_path))
        1 / 0  # noqa: B018
    assert child.status == -signal.SIGKILL


def test_a_second_ctrl_c_does_not_wait_for_the_stubborn(tmp_path):
    began = time.monotonic()
    timers = [threading.Timer(t, os.kill, (os.getpid(), signal.SIGINT)) for t in (0.1, 0.2)]
    with Interrupts() as interrupts, Children(interrupts) as children:
        children.add(child := child_of(STUBBORN, tmp_path))
        for timer in timers:
            timer.start()
    assert child.status == -signal.SIGKILL
    assert time.monotonic() - began < 5  # it would have been 20 seconds


def test_the_news_of_a_child_come_from_its_journal(tmp_path):
    child = child_of("", tmp_path)
    assert child.news() == []
    (tmp_path / "run-1" / "fake").mkdir(parents=True)
    (tmp_path / "run-1" / "fake" / "metrics.jsonl").write_text('{"event": "x"}\n')
    assert child.news() == [{"event": "x"}]
    assert child.news() == []
