"""The cases on loopback: processes that are killed or stopped, lost doors, and peers that lie."""

import signal
import time

from tests.faults.play import CASES, ROUND, Case, Play, case
from tests.faults.stage import NAMES
from tests.swarm.processes import free_port

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
        play.open(rounds=12, epoch=4.0, each={name: {"holds": (hold,)} for name in NAMES})
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
    play.open(rounds=12, epoch=4.0, each={name: {"holds": (hold,)} for name in NAMES})
    victim = play.victim()
    for other in play.others(victim):
        other.release(hold)
    victim.wait_for("training", ROUND)
    struck = time.time()
    victim.kill()
    again = play.trainers[victim.name] = play.stage.again(victim)
    play.takes_part_again(again, struck)
    play.stage.hurry()
    play.judge([*play.trainers.values()], [], struck)


@case("aggregator lost for good")
def aggregator_lost(play: Play) -> None:
    """It leads nothing and reduces nothing, so no round has anything to say of it."""
    play.open(rounds=10, epoch=1.5)
    judge = play.stage.start("judge", role="aggregator")
    seen = play.trainers["ann"].wait_for_row("evaluation_seen")
    judge.wait_for_row("evaluated", after=seen["time"])
    struck = time.time()
    judge.kill()
    play.judge([*play.trainers.values()], [], struck)


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


# ---- adversaries: a peer that speaks the protocol and, from one round on, lies


def lied(lie: str, why: str) -> Case:
    """why: the reason that the ledgers must give."""

    def played(play: Play) -> None:
        play.open()
        victim = play.victim()
        victim.wait_for("training", ROUND)
        struck = time.time()
        victim.orders.lie.write_text(lie)
        play.judge(play.others(victim), [victim], struck, why)

    return played


CASES["sends NaN"] = lied("nan", "not finite")
CASES["declares a weight of 1e30"] = lied("weight", "sane number")
CASES["reduces to garbage"] = lied("garbage", "larger than any")
CASES["joins and then says nothing"] = lied("silence", "said nothing|silent")
