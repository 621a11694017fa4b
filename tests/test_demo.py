"""The whole demo with peers that are none: how it starts, watches and ends them."""

import io
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from p2pllm import children as children_module
from p2pllm import demo, errors
from p2pllm.config.load import load_run
from p2pllm.config.run import DataConfig

PYTHON = (sys.executable, "-S", "-E", "-c")  # quick to start

# A peer that needs no network: argv is that of p2pllm, the journal that of its role.
PEER = """
import json, os, pathlib, signal, sys, time
command, words = sys.argv[1], sys.argv[2:]
name, output = (words[words.index(flag) + 1] for flag in ("--name", "--output"))
folder = pathlib.Path(output, "demo-0123456789", name)
folder.mkdir(parents=True)
journal = open(folder / "metrics.jsonl", "a")
def tell(event, **fields):
    print(json.dumps({"event": event, "time": 0.0, **fields}), file=journal, flush=True)
print("hello from", name, os.environ.get("HF_HUB_OFFLINE"), flush=True)
if command == "bootstrap":
    tell("opened", run="demo-0123456789", addresses=["/ip4/127.0.0.1/tcp/1/p2p/A"])
    time.sleep(60)
assert words[words.index("--initial-peers") + 1] == "/ip4/127.0.0.1/tcp/1/p2p/A"
SCRIPT
"""
FINISH = """
for round, loss in ((0, 3.6), (1, 3.1)):
    if command == "aggregate":
        tell("evaluated", round=round, digest="d", loss=loss, rows=8, seconds=1.0)
tell("finished", round=1, digest="ab12", path=str(folder / "final"))
"""
LINGER = "time.sleep(60)"
CRASH = "sys.exit('no memory left') if command == 'join' else time.sleep(60)"


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text("rounds: 1\nmodel: {random_init: {}}\ndata: {source: 'package:stdlib-qa'}\n")
    return path


@pytest.fixture
def quick(monkeypatch):
    """Children that are no peers, watched closely."""
    monkeypatch.setattr(demo, "POLL", 0.02)
    patience = tuple((number, 5.0) for number, _ in children_module.POLITENESS)
    monkeypatch.setattr(children_module, "POLITENESS", patience)

    def peers(script):
        program = (*PYTHON, PEER.replace("SCRIPT", script))
        monkeypatch.setattr(demo, "PROGRAM", program)

    return peers


def recorded(width=100, height=30, terminal=False):
    return Console(width=width, height=height, force_terminal=terminal, file=io.StringIO())


def descendants():
    """Processes whose parent is this one, zombies left out."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == os.getpid() and state != "Z":
            found.append(stat.parent.name)
    return found


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = {number: signal.getsignal(number) for number in children_module.ENDINGS}
    others = descendants()
    yield
    assert descendants() == others
    assert {n: signal.getsignal(n) for n in children_module.ENDINGS} == before


def test_a_demo_starts_its_peers_and_ends_with_what_came_of_it(quick, run_file, tmp_path):
    quick(FINISH)
    console = recorded()
    assert demo.run_demo(run_file, 3, tmp_path / "runs", console) == 0
    text = console.file.getvalue()
    assert "3.600 → 3.100 in 1 rounds" in text
    assert "the same on ann, bob, cat, aggregator: sha256 ab12" in text
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "loss.png").stat().st_size > 1000
    assert sorted(log.stem for log in folder.glob("*.log")) == [
        "aggregator",
        "ann",
        "bob",
        "bootstrap",
        "cat",
    ]


def test_the_screen_of_a_terminal_is_drawn_and_taken_away(quick, run_file, tmp_path):
    quick(FINISH)
    console = recorded(terminal=True)
    assert demo.run_demo(run_file, 1, tmp_path, console) == 0
    text = console.file.getvalue()
    on, off = text.index("\x1b[?1049h"), text.index("\x1b[?1049l")
    assert "p2pllm demo" in text[on:off]
    assert "the run is over" in text[off:]
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back


def test_children_inherit_nothing_that_was_meant_for_another_peer(quick, run_file, monkeypatch):
    monkeypatch.setenv("P2PLLM_INITIAL_PEERS", "elsewhere")
    run = load_run(run_file)
    inherited = demo._environment(run)
    assert "P2PLLM_INITIAL_PEERS" not in inherited
    assert inherited["P2PLLM_CACHE"] == os.environ["P2PLLM_CACHE"]
    assert inherited["HF_HUB_OFFLINE"] == "1"
    hub = run.model_copy(update={"data": DataConfig(source="someone/something")})
    assert "HF_HUB_OFFLINE" not in demo._environment(hub)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_demo_leaves_nobody_behind(quick, run_file, tmp_path, number):
    quick(LINGER)
    console = recorded()
    stopper = threading.Thread(target=interrupt_when_all_run, args=(tmp_path / "runs", number))
    stopper.start()
    assert demo.run_demo(run_file, 2, tmp_path / "runs", console) == 130
    stopper.join()
    assert "No process of the demo is left" in console.file.getvalue()


def interrupt_when_all_run(output, number):
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        logs = list(output.glob("*/*.log"))
        if len(logs) == 4 and all("hello" in log.read_text() for log in logs):
            break
        time.sleep(0.02)
    os.kill(os.getpid(), number)


def test_a_demo_whose_trainers_are_all_gone_names_the_reason(quick, run_file, tmp_path):
    quick(CRASH)
    console = recorded()
    with pytest.raises(errors.DemoTrainersGone, match="no memory left") as caught:
        demo.run_demo(run_file, 2, tmp_path / "runs", console)
    assert str(tmp_path / "runs") in caught.value.letter
    assert "ended too early, with status 1" in console.file.getvalue()


def test_a_demo_goes_on_without_one_trainer(quick, run_file, tmp_path):
    quick("if name == 'bob': sys.exit('out of luck')\n" + FINISH)
    console = recorded()
    assert demo.run_demo(run_file, 2, tmp_path / "runs", console) == 0
    text = console.file.getvalue()
    assert "out of luck" in text
    assert "the same on ann, aggregator" in text


def test_a_demo_whose_run_cannot_be_founded_says_why(quick, run_file, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "PROGRAM", (*PYTHON, "raise SystemExit('port in use')"))
    with pytest.raises(errors.DemoChildDied, match="port in use"):
        demo.run_demo(run_file, 2, tmp_path / "runs", recorded())


def test_a_demo_in_which_nothing_happens_is_ended(quick, run_file, tmp_path, monkeypatch):
    quick(LINGER)
    monkeypatch.setattr(demo, "STALLED", 0.2)
    with pytest.raises(errors.DemoStalled, match="logs lie in"):
        demo.run_demo(run_file, 1, tmp_path / "runs", recorded())


def test_an_output_that_cannot_be_written_is_a_letter(quick, run_file, tmp_path):
    with pytest.raises(errors.OutputUnwritable):
        demo.run_demo(run_file, 1, run_file / "below-a-file", recorded())


def test_each_demo_of_a_second_has_its_own_folder(tmp_path):
    assert len({demo._fresh_folder(tmp_path) for _ in range(3)}) == 3


def test_there_are_names_for_as_many_trainers_as_are_asked_for():
    assert demo.trainer_names(3) == ["ann", "bob", "cat"]
    assert len(set(demo.trainer_names(40))) == 40
