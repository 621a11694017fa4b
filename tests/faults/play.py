"""One case of the fault matrix while it is played, and what is judged in all of them.

What must hold is always the same: nobody hangs, the survivors complete the run, all who are there
at the end hold the same adapter, and the survivors' ledgers name who was missing and why.
"""

import re
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.lab import Lab
from tests.faults.stage import NAMES, Actor, Stage, reasons, wait_until

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

    @property
    def verdict(self) -> str:
        words = "FAILED: " + self.problem if self.problem else self.cause
        return words + "".join(f"; also blamed {who}" for who in self.blamed)

    @property
    def cells(self) -> tuple[str, ...]:
        """As a row of the table."""
        seconds = (f"{s:.1f}" if s == s else "-" for s in (self.recovery, self.back))
        return (self.case, self.lost, *seconds, "yes" if self.equal else "NO", self.verdict)


Case = Callable[["Play"], None]
CASES: dict[str, Case] = {}
NEEDS: dict[str, tuple[str, ...]] = {}  # the commands, besides `ip`, of cases in a lab


def case(name: str, *needs: str) -> Callable[[Case], Case]:
    """needs: `lab`, and the commands that it takes besides `ip`, of a case in namespaces."""

    def put(function: Case) -> Case:
        CASES[name] = function
        if needs:
            NEEDS[name] = needs[1:]
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
            assert not any("12D3KooW" in s for s in said), f"not for people: {said}"
            assert any(re.search(why, s) for s in said), f"not the cause: {sorted(set(said))}"

    def _measure(self, actors: list[Actor], struck: float) -> None:
        firsts, lost, failed = [], 0, 0
        ledgers = [actor.ledger for actor in actors]
        commits = [[r for r in rows if r["event"] == "round_committed"] for rows in ledgers]
        for actor, ledger, own in zip(actors, ledgers, commits, strict=True):
            firsts.append(min((r["time"] for r in own if r["time"] > struck), default=0.0))
            # In its life: one that was started again had no part in what was before.
            theirs = {r["round"] for rows in commits for r in rows if r["time"] > actor.born}
            lost = max(lost, len(theirs - {r["round"] for r in own}))
            failed = max(failed, sum(r["event"] == "round_missed" for r in ledger))
        self.outcome.lost = f"{lost} ({failed})"
        if firsts:
            self.outcome.recovery = max(firsts) - struck

    def takes_part_again(self, victim: Actor, since: float, timeout: float = 90.0) -> None:
        """Until it has committed a round together with another since then."""

        def committed(actor: Actor) -> dict[str, float]:
            rows = actor.rows(event="round_committed")
            return {r["digest"]: r["time"] for r in rows if r["time"] > since}

        def look() -> float | None:
            theirs = {digest for actor in self.others(victim) for digest in committed(actor)}
            return next((at for digest, at in committed(victim).items() if digest in theirs), None)

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
