"""How the threads of a peer wait for what goes on in its event loop."""

import asyncio
import threading
import time
from concurrent.futures import Future

import pytest

from p2pllm.swarm.swarm import EventLoopThread, Pending


class DoneInTheSameMoment(Future[str]):
    """Its result comes just as somebody has waited long enough for it."""

    def result(self, timeout=None):
        if timeout is None or self.done():
            return super().result(timeout)
        self.set_result("too soon")
        raise TimeoutError


def test_work_that_is_done_as_the_wait_for_it_ends_is_done():
    future = DoneInTheSameMoment()
    threading.Timer(0.15, future.set_result, ("done",)).start()
    assert Pending(future, threading.Event()).result() == "done"


@pytest.fixture
def thread():
    thread = EventLoopThread()
    yield thread
    thread.close()


def test_what_the_work_raises_comes_through(thread):
    async def work():
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        Pending(thread.submit(work()), threading.Event()).result()


def test_who_is_asked_to_stop_waits_until_the_work_has_cleaned_up(thread):
    stop, cleaned = threading.Event(), threading.Event()

    async def work():
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.2)
            cleaned.set()

    pending = Pending(thread.submit(work()), stop)
    threading.Timer(0.2, stop.set).start()
    began = time.monotonic()
    assert pending.result() is None
    assert cleaned.is_set()
    assert time.monotonic() - began < 10
