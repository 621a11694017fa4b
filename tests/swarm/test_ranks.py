"""One peer as several processes: the same training, and nothing is left when one of them ends."""

import json
import signal
from pathlib import Path

import numpy as np
import psutil
import pytest

from p2pllm.model.adapter import adapter_values
from tests.swarm.peer import LOADED, Peer, wait_until
from tests.swarm.processes import TINY, Processes, run

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(240)]

TWO = ("--launcher", "torchrun", "--ranks", "2")
ENDED = 20.0  # seconds


def test_two_ranks_train_like_one(tmp_path):
    # Batches of five: the ranks have unequal shares. Micro-batches of one besides.
    settings = ("training.batch_size=5", "rounds=2", "averaging.lora=alternate")
    words = [word for s in settings for word in ("--set", s)]
    results = {}
    for name, options in (("one", ("--launcher", "python")), ("two", TWO)):
        folder = ("--output", str(tmp_path / name), "--threads", "1", "--micro-batch", "1")
        code, _, letter = run("train", str(TINY), *words, *options, *folder, cwd=tmp_path)
        assert code == 0, letter
        results[name] = outcome(tmp_path / name / "tiny/train")
    (one, one_losses), (two, two_losses) = results["one"], results["two"]
    assert np.abs(one).max() > 1e-3
    np.testing.assert_allclose(two, one, atol=1e-5)
    assert two_losses == pytest.approx(one_losses, rel=1e-5)
    assert len(one_losses) == 2


def outcome(folder: Path) -> tuple[np.ndarray, list[float]]:
    rows = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    return adapter_values(folder / "final"), [row["loss"] for row in rows]


def test_a_peer_of_two_ranks_takes_part_like_any_other(processes: Processes):
    door = processes.bootstrap("rounds=3", "averaging.min_peers=2")
    ann = processes.trainer("ann", door.address, *TWO)
    bob = processes.trainer("bob", door.address)
    for peer in (ann, bob):
        peer.finish(LOADED)
    digests = {peer.events("finished")[0]["digest"] for peer in (ann, bob)}
    assert len(digests) == 1
    assert all(row["peers"] for row in ann.events("round_committed"))


@pytest.fixture(scope="module")
def door(shared_processes: Processes) -> Peer:
    return shared_processes.bootstrap("rounds=1000", "training.local.steps=50")


@pytest.mark.parametrize("end", ["Ctrl+C", "rank 0", "rank 1", "launcher"])
def test_no_rank_outlives_the_others(shared_processes: Processes, door: Peer, end: str):
    """However it ends: by Ctrl+C, or because one process of it gets a kill -9."""
    ann = shared_processes.trainer(end.replace(" ", "-").replace("+", ""), door.address, *TWO)
    ann.wait_for("round_committed", LOADED)
    family = psutil.Process(ann.process.pid).children(recursive=True)
    ranks = {f"rank {p.environ()['RANK']}": p for p in family if is_rank(p)}
    assert set(ranks) == {"rank 0", "rank 1"}
    listening = [port for p in ranks.values() for port in ports(p)]
    assert set(listening) <= {"127.0.0.1"}
    match end:
        case "Ctrl+C":
            ann.interrupt()
        case "launcher":
            ann.kill()
        case _:
            ranks[end].send_signal(signal.SIGKILL)
    wait_until(lambda: not any(alive(p) for p in family), "all have ended", ENDED)
    code = ann.process.wait(ENDED)
    assert (code == 0) == (end == "Ctrl+C")
    if end != "launcher":  # of two that are killed with it, one may yet see the other go
        told = "processes has ended, and so must the others" in ann.printed
        assert told == end.startswith("rank")
    assert "Traceback" not in ann.printed


def is_rank(process: psutil.Process) -> bool:
    command = process.cmdline()
    return "-m" in command and "p2pllm" in command and "RANK" in process.environ()


def ports(process: psutil.Process) -> list[str]:
    """At which addresses it listens."""
    found = process.net_connections("tcp")
    return [c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN]


def alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
