"""The systems that p2pllm is compared with: stock hivemind, and gloo."""

import contextlib
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch
from hivemind import DHT, DecentralizedAverager
from hivemind.compression import Float16Compression, NoCompression

from tests.benchmarks.peer import LONGEST, LOOPBACK, Peer, Round


class _Timed(DecentralizedAverager):  # type: ignore[misc]
    """Stock, plus two readings of the clock around its all-reduce."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.clock = multiprocessing.get_context("fork").Array("d", 2)
        self.members = multiprocessing.get_context("fork").Value("i", 0)
        super().__init__(*args, **kwargs)

    async def _aggregate_with_group(self, group_info: Any, *args: Any, **kwargs: Any) -> Any:
        self.clock[0] = time.monotonic()
        self.members.value = group_info.group_size
        try:
            return await super()._aggregate_with_group(group_info, *args, **kwargs)
        finally:
            self.clock[1] = time.monotonic()


class Stock(Peer):
    """hivemind's DecentralizedAverager, with its defaults or tuned by hand."""

    def __init__(self, settings: Literal["defaults", "tuned"]) -> None:
        self.tuned = settings == "tuned"

    def start(self, meeting: str) -> str:
        self._dht = DHT(initial_peers=meeting.split(), host_maddrs=[LOOPBACK], start=True)
        tuning: dict[str, Any] = {"compression": NoCompression()}
        if self.tuned:
            tuning = {
                "compression": Float16Compression(),
                "target_group_size": self.n,
                "min_matchmaking_time": 3.0,
                "request_timeout": 1.0,
            }
        self._mine = torch.from_numpy(self.contribution())
        self._averager = _Timed(
            [self._mine.clone()], self._dht, prefix="bench", start=True, **tuning
        )
        return " ".join(str(a) for a in self._dht.get_visible_maddrs())

    def prepare(self, number: int) -> None:
        with self._averager.get_tensors() as (tensor,):
            tensor.copy_(self._mine)

    def round(self, number: int) -> Round:
        began = time.monotonic()
        try:
            self._averager.step(timeout=LONGEST / 2, wait=False).result(timeout=LONGEST)
        except Exception as failure:  # noqa: BLE001 - whatever it is, the round is lost
            return Round(time.monotonic(), None, 0.0, repr(failure)[:80])
        ended = time.monotonic()
        formed, reduced = self._averager.clock[:]
        with self._averager.get_tensors() as (tensor,):
            problem = self.problem_with(tensor.numpy())
        if self._averager.members.value != self.n:
            problem = f"a group of {self._averager.members.value}"
        return Round(ended, formed - began, reduced - formed, problem)

    def close(self) -> None:
        self._averager.shutdown()
        self._dht.shutdown()


class Gloo(Peer):
    """torch.distributed's all-reduce: no encryption, no group forming, no survivors."""

    def start(self, meeting: str) -> str:
        self._meeting = meeting or tempfile.mkdtemp(prefix="p2pllm-bench-gloo-")
        self._mine = torch.from_numpy(self.contribution())
        self._tensor = self._mine.clone()
        return self._meeting

    def prepare(self, number: int) -> None:
        if not torch.distributed.is_initialized():  # here, as it waits for the others
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            torch.distributed.init_process_group(
                "gloo", f"file://{self._meeting}/store", rank=self.rank, world_size=self.n
            )
        self._tensor.copy_(self._mine)

    def round(self, number: int) -> Round:
        began = time.monotonic()
        torch.distributed.all_reduce(self._tensor)
        self._tensor /= self.n
        ended = time.monotonic()
        return Round(ended, None, ended - began, self.problem_with(self._tensor.numpy()))

    def close(self) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        with contextlib.suppress(OSError):
            (Path(self._meeting) / "store").unlink()
            Path(self._meeting).rmdir()
