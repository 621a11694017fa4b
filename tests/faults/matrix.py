"""The fault matrix: real peers, real sockets, and one blow in each case.

    python -m tests.faults.matrix [CASE…]

What must hold is always the same: nobody hangs, the survivors complete the run, all who are there
at the end hold the same adapter, and the survivors' ledgers name who was missing and why.
"""

import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.lab import Lab, usable
from tests.faults.stage import NAMES, Actor, Stage, reasons, wait_until
from tests.swarm.processes import free_port

HOSTS = " ".join(("door", *NAMES))
ROUND = 2  # in which the blow falls: the deadline has been learned by then


@dataclass
class Outcome:
    """One line of the table."""

    case: str
    lost: str = "?"  # rounds that a survivor could not complete itself, and failed attempts
    recovery: float = float("nan")  # seconds from the blow until all survivors have committed again
    back: float = float("nan")  # seconds from the end of the trouble until the victim takes part
    equal: bool = False  # all digests at the end
    cause: str = ""  # the ledgers' words
    blamed: list[str] = field(default_factory=list)  # survivors that the ledgers name as well
    problem: str = ""  # why the case failed

    def __str__(self) -> str:
        seconds = "".join(
            f" {s:8.1f}" if s == s else "        -" for s in (self.recovery, self.back)
        )
        verdict = "FAILED: " + self.problem if self.problem else self.cause
        verdict += "".join(f"; also blamed {who}" for who in self.blamed)
        return (
            f"{self.case:36} {self.lost:>9}{seconds} {'yes' if self.equal else 'NO':>6}  {verdict}"
        )


HEAD = f"{'case':36} {'lost':>9} {'recovery':>8} {'back':>8} {'equal':>6}  cause in the ledger"
Case = Callable[["Play"], None]
CASES: dict[str, Case] = {}
NEEDS: dict[str, tuple[str, ...]] = {}  # the commands, besides `ip`, of cases in a lab


def case(name: str) -> Callable[[Case], Case]:
    def put(function: Case) -> Case:
        CASES[name] = function
        return function

    return put


class Play:
    """One case while it runs."""

    def __init__(self, name: str, folder: Path, is_quick: bool) -> None:
        self.outcome, self.is_quick = Outcome(name), is_quick
        self._folder = folder
        self.stage: Stage
        self.lab: Lab | None = None
        self.ends = ExitStack()  # what is closed after the stage
        self.trainers: dict[str, Actor] = {}

    def open(self, **orders: Any) -> None:
        """Four trainers in round 0. each: orders of single peers, by name."""
        each = orders.pop("each", {})
        self.stage = Stage(self._folder, self.lab, **orders)
        self.trainers = self.stage.open(**each)

    def in_lab(self, hosts: str = HOSTS) -> Lab:
        """Every peer on a host of its own, from now on."""
        self.lab = self.ends.enter_context(Lab(hosts))
        return self.lab

    def victim(self, leads: bool = False) -> Actor:
        """Somebody who leads, or does not lead, the group."""
        return next(a for n, a in self.trainers.items() if (n == self.stage.leader()) == leads)

    def others(self, *victims: Actor) -> list[Actor]:
        return [a for a in self.trainers.values() if a not in victims]

    def judge(
        self,
        survivors: list[Actor],
        victims: list[Actor],
        struck: float,
        why: str = "",
        patience: float = 150.0,
    ) -> None:
        """The survivors complete the run, alike, and say what happened to the victims."""
        if self.is_quick:  # nobody stays, as a donor, until the record of a dead peer has expired
            for actor in survivors:
                actor.wait_for_row("checkpoint_saved", timeout=patience)
            for actor in survivors:
                actor.signal(signal.SIGTERM)
        for actor in survivors:
            wait_until(lambda a=actor: a.final or a.code, f"{actor.name} finishes", patience)  # type: ignore[misc]
        codes = {actor.name: actor.end(20) for actor in survivors}
        assert not any(codes.values()), codes
        assert None not in codes.values(), f"does not end: {codes}"
        digests = {actor.name: actor.final for actor in survivors}
        self.outcome.equal = len(set(digests.values())) == 1
        self._measure([a for a in self.others(*victims) if a in survivors], struck)
        assert self.outcome.equal, digests
        for innocent in set(self.others(*victims)) & set(survivors):
            if said := reasons([a.ledger for a in survivors if a not in victims], innocent.name):
                self.outcome.blamed.append(f"{innocent.name}: {said[0]}")
        for victim in victims:
            said = reasons([a.ledger for a in survivors if a is not victim], victim.name)
            self.outcome.cause = next(iter(said), "")
            assert said, f"no ledger names {victim.name}"
            assert any(re.search(why, s) for s in said), f"not the cause: {sorted(set(said))}"

    def _measure(self, actors: list[Actor], struck: float) -> None:
        firsts, lost, failed = [], 0, 0
        for actor in actors:
            commits = [r for r in actor.ledger if r["event"] == "round_committed"]
            firsts.append(min((r["time"] for r in commits if r["time"] > struck), default=0.0))
            done = {r["round"] for r in commits}
            lost = max(lost, len(set(range(max(done, default=0))) - done))
            failed = max(failed, sum(r["event"] == "round_missed" for r in actor.ledger))
        self.outcome.lost = f"{lost} ({failed})"
        if firsts:
            self.outcome.recovery = max(firsts) - struck

    def takes_part_again(self, victim: Actor, since: float, timeout: float = 90.0) -> None:
        def look() -> float | None:
            rows = victim.rows(event="round_committed")
            return next((r["time"] for r in rows if r["time"] > since and r["peers"][1:]), None)

        found = wait_until(look, f"{victim.name} takes part in a round again", timeout)
        self.outcome.back = found - since


@contextmanager
def playing(name: str, folder: Path, is_quick: bool) -> Iterator[Play]:
    """Whatever happens in the case becomes its outcome; nobody is left behind."""
    play = Play(name, folder, is_quick)
    try:
        yield play
    except (AssertionError, OSError, RuntimeError) as problem:
        play.outcome.problem = str(problem) or type(problem).__name__
    finally:
        if hasattr(play, "stage"):
            report = play.stage.report()
            left = play.stage.close()
            if left and not play.outcome.problem:
                play.outcome.problem = "; ".join(left)
            (folder / "report.txt").write_text(report)
        play.ends.close()


def run(name: str, folder: Path, is_quick: bool = False) -> Outcome:
    with playing(name, folder, is_quick) as play:
        CASES[name](play)
    return play.outcome


# ---- kill -9


def killed_at(phase: str, leads: bool) -> Case:
    def played(play: Play) -> None:
        hold = f"{phase}:{ROUND}"
        play.open(each={name: {"holds": (hold,)} for name in NAMES})
        victim = play.victim(leads)
        for other in play.others(victim):
            other.release(hold)
        victim.wait_for(phase, ROUND)
        if phase == "training":
            time.sleep(1.0)  # the others are waiting for it by now
        struck = time.time()
        victim.kill()
        play.judge(play.others(victim), [victim], struck)

    return played


def killed_while_forming(leads: bool) -> Case:
    def played(play: Play) -> None:
        hold = f"training:{ROUND}"
        play.open(each={name: {"holds": (hold,)} for name in NAMES})
        victim = play.victim(leads)
        slow = play.others(victim)[-1] if not leads else play.others(victim)[0]
        for other in play.others(slow):
            other.release(hold)
        victim.wait_for("forming", ROUND)
        time.sleep(1.0)  # it sits in the group, which waits for the slow one
        struck = time.time()
        victim.kill()
        time.sleep(1.0)
        slow.release(hold)
        play.judge(play.others(victim), [victim], struck)

    return played


for leads in (False, True):
    who = " (leader)" if leads else ""
    CASES[f"kill -9 while training{who}"] = killed_at("training", leads)
    CASES[f"kill -9 while forming{who}"] = killed_while_forming(leads)
    CASES[f"kill -9 while sending{who}"] = killed_at("sending", leads)
    CASES[f"kill -9 while reducing{who}"] = killed_at("reducing", leads)
    CASES[f"kill -9 after commit{who}"] = killed_at("committed", leads)


@case("kill -9 of half of the trainers")
def half_killed(play: Play) -> None:
    hold = f"reducing:{ROUND}"
    play.open(each={name: {"holds": (hold,)} for name in NAMES})
    victims = [play.victim(leads=True), play.victim()]
    for other in play.others(*victims):
        other.release(hold)
    for victim in victims:
        victim.wait_for("reducing", ROUND)
    struck = time.time()
    for victim in victims:
        victim.kill()
    play.judge(play.others(*victims), victims, struck)


def daemon_killed(leads: bool) -> Case:
    def played(play: Play) -> None:
        hold = f"reducing:{ROUND}"
        play.open(rounds=12, epoch=2.0, each={name: {"holds": (hold,)} for name in NAMES})
        victim = play.victim(leads)
        for other in play.others(victim):
            other.release(hold)
        victim.wait_for("reducing", ROUND)
        struck = time.time()
        victim.kill_daemon()
        victim.release(hold)
        play.takes_part_again(victim, struck)
        play.stage.hurry()
        play.judge([*play.trainers.values()], [victim], struck)

    return played


CASES["kill -9 of p2pd"] = daemon_killed(False)
CASES["kill -9 of p2pd (leader)"] = daemon_killed(True)


@case("restart as the same within the round")
def restarted(play: Play) -> None:
    hold = f"training:{ROUND}"
    play.open(each={name: {"holds": (hold,)} for name in NAMES})
    victim = play.victim()
    for other in play.others(victim):
        other.release(hold)
    victim.wait_for("training", ROUND)
    struck = time.time()
    victim.kill()
    again = play.stage.again(victim)
    play.judge([*play.others(victim), again], [], struck)
    play.outcome.back = again.wait_for_row("round_committed")["time"] - struck


@case("bootstrap peer lost for good, newcomer")
def door_lost(play: Play) -> None:
    host = f"/ip4/127.0.0.1/tcp/{free_port()}"
    play.open(rounds=12, epoch=2.0, each={"ann": {"host": host}})
    play.trainers["bob"].wait_for("training", ROUND)
    struck = time.time()
    play.stage.actors[0].kill()
    address = f"{host}/p2p/{play.stage.keys['ann']}"
    eve = play.stage.start("eve", initial_peers=(address,), step=5e-3)
    play.takes_part_again(eve, struck)
    play.stage.hurry()
    play.judge([*play.trainers.values(), eve], [], struck)


# ---- SIGSTOP


def stopped_at(phase: str, seconds: float, leads: bool, rounds: int = 25) -> Case:
    def played(play: Play) -> None:
        hold = f"{phase}:{ROUND}"
        play.open(rounds=rounds, epoch=3.0, each={name: {"holds": (hold,)} for name in NAMES})
        victim = play.victim(leads)
        for other in play.others(victim):
            other.release(hold)
        victim.wait_for(phase, ROUND)
        struck = time.time()
        victim.signal(signal.SIGSTOP)
        victim.release(hold)
        time.sleep(seconds)
        victim.signal(signal.SIGCONT)
        play.takes_part_again(victim, time.time())
        play.stage.hurry()
        play.judge([*play.trainers.values()], [victim], struck)

    return played


for leads in (False, True):
    who = " (leader)" if leads else ""
    for phase in ("training", "forming", "sending", "reducing", "committed"):
        CASES[f"SIGSTOP 30 s, {phase}{who}"] = stopped_at(phase, 30.0, leads)
CASES["SIGSTOP 12 s, reducing"] = stopped_at("reducing", 12.0, leads=False, rounds=12)


# ---- in network namespaces


def cut_off(seconds: float, leads: bool) -> Case:
    def played(play: Play) -> None:
        lab = play.in_lab()
        hold = f"reducing:{ROUND}"
        play.open(
            rounds=10 + round(seconds / 2),
            epoch=3.0,
            each={name: {"holds": (hold,)} for name in NAMES},
        )
        victim = play.victim(leads)
        for other in play.others(victim):
            other.release(hold)
        victim.wait_for("reducing", ROUND)
        struck = time.time()
        lab.cut(victim.name)
        victim.release(hold)
        time.sleep(seconds)
        lab.heal()
        play.takes_part_again(victim, time.time())
        play.stage.hurry()
        play.judge([*play.trainers.values()], [victim], struck)

    return played


for leads in (False, True):
    who = " (leader)" if leads else ""
    for seconds in (20, 60):
        CASES[f"link cut {seconds} s{who}"] = cut_off(seconds, leads)


@case("partition 2+2 for 60 s")
def parted(play: Play) -> None:
    lab = play.in_lab()
    play.open(rounds=60, epoch=3.0)
    for actor in play.trainers.values():
        actor.wait_for("training", ROUND)
    struck = time.time()
    lab.part("door ann bob", "cat dan")
    time.sleep(60)
    lab.heal()
    healed = time.time()

    def together() -> bool:
        """Whether all four have committed one round together since."""
        return all(
            any(r["time"] > healed and len(r.get("peers", ())) == 4 for r in actor.ledger)
            for actor in play.trainers.values()
        )

    wait_until(together, "all four in one group again", 120)
    play.outcome.back = time.time() - healed
    play.stage.hurry()
    play.judge([*play.trainers.values()], [], struck)


@case("2 % loss")
def lossy(play: Play) -> None:
    lab = play.in_lab()
    lab.lose(2)
    play.open()
    play.judge([*play.trainers.values()], [], time.time())


@case("one peer at 1/20 of the bandwidth")
def slow(play: Play) -> None:
    lab = play.in_lab()
    for name in NAMES:
        lab.slow(name, 100)
    lab.slow("dan", 5)
    play.open(rounds=4)
    play.judge([*play.trainers.values()], [], time.time())


def hidden(knows: bool) -> Case:
    def played(play: Play) -> None:
        lab = play.in_lab("door ann bob cat")
        lab.add_gateway("gate")
        lab.add("dan", behind="gate")
        play.open(each={"dan": {"client_only": knows}})
        play.judge([*play.trainers.values()], [], time.time())
        for actor in play.trainers.values():
            commits = [r for r in actor.ledger if r["event"] == "round_committed"]
            assert len([r for r in commits if len(r["peers"]) == 4]) >= 4, "dan took no part"

    return played


CASES["behind a NAT, client_only"] = hidden(True)
CASES["behind a NAT and not aware of it"] = hidden(False)


for name in CASES:
    if name.startswith(("link cut", "partition")):
        NEEDS[name] = ()
    elif name.startswith(("2 % loss", "behind a NAT")):
        NEEDS[name] = ("iptables",)
    elif "bandwidth" in name:
        NEEDS[name] = ("tc",)


# ---- the program


def main(wanted: list[str]) -> int:
    chosen = [name for name in CASES if not wanted or any(w in name for w in wanted)]
    print(HEAD, flush=True)
    passed = failed = 0
    for name in chosen:
        folder = Path(tempfile.mkdtemp(prefix="faults-"))
        if name in NEEDS and (missing := usable(*NEEDS[name])):
            print(f"{name:36}   skipped: {missing}", flush=True)
            continue
        outcome = run(name, folder)
        print(outcome, flush=True)
        if outcome.problem:
            failed += 1
            print(f"    see {folder}/report.txt", flush=True)
        else:
            passed += 1
            shutil.rmtree(folder)
    print(f"{passed} passed, {failed} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
