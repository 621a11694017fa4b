"""The cases on hosts in network namespaces: cut, parted, lossy and slow links, and a NAT."""

import time

from tests.faults.play import ROUND, Case, Play, case
from tests.faults.stage import NAMES, wait_until


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
        case(f"link cut {seconds} s{who}", "lab")(cut_off(seconds, leads))


@case("partition 2+2 for 60 s", "lab")
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
    # The bootstrap peer's half counts as the one that was struck; both halves may have gone on.
    victims = [play.trainers["cat"], play.trainers["dan"]]
    play.judge([*play.trainers.values()], victims, struck)


@case("2 % loss", "lab", "iptables")
def lossy(play: Play) -> None:
    lab = play.in_lab()
    lab.lose(2)
    play.open()
    play.judge([*play.trainers.values()], [], time.time())


@case("one peer at 1/20 of the bandwidth", "lab", "tc")
def slow(play: Play) -> None:
    lab = play.in_lab()
    for name in NAMES:
        lab.slow(name, 100)
    lab.slow("dan", 5)
    play.open(rounds=4, by_line=True)
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
            troubles = [row["what"] for row in actor.rows(event="trouble")]
            assert not any("daemon" in what for what in troubles), troubles

    return played


case("behind a NAT, client_only", "lab", "iptables")(hidden(True))
case("behind a NAT and not aware of it", "lab", "iptables")(hidden(False))
