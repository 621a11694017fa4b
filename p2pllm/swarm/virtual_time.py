"""An event loop whose clock jumps to the next timer whenever nobody has anything to do.

A simulated run of hours takes as long as its computations, and takes the same course each time: the
work itself costs no time by this clock, only what is waited for does.
"""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class NothingWillHappen(RuntimeError):
    """Every task waits for another one, and no timer is set: in real time this would hang."""


class _Jump(selectors.DefaultSelector):
    """Where an event loop would sleep until its next timer, the clock goes there at once."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if not ready and timeout is None:
            raise NothingWillHappen("every task waits for another one, and no timer is set")
        if not ready:
            self.now += timeout or 0.0
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Time starts at 0 seconds. For code that waits for nothing outside of this loop."""

    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now

    def run_in_executor(
        self, executor: Any, func: Callable[[*Ts], T], *args: *Ts
    ) -> "asyncio.Future[T]":
        """At once, and here: time must not jump ahead of a thread that is still at work."""
        future: asyncio.Future[T] = self.create_future()
        future.set_result(func(*args))
        return future


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` in virtual time."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
