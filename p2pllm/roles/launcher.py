"""One peer as several processes on one machine, started and watched by torchrun's agent.

When one process ends, however it does, the agent ends the others; when the agent is gone, they end
by themselves. Nothing listens but on loopback: the ranks meet through a file.
"""

import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from p2pllm.config.peer import PeerConfig

if TYPE_CHECKING:
    from p2pllm.training.ranks import Ranks

MEETING = "P2PLLM_RANKS"  # environment variable: the file through which the ranks find each other


def ranks_wanted(launcher: str, count: int | None, device: str) -> int:
    """How many processes: as many as asked for, or one for each GPU that CUDA_VISIBLE_DEVICES
    leaves. `auto` is torchrun where that is more than one."""
    if launcher == "python":
        return 1
    import torch

    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 1
    return count or max(gpus, 1)


def launch(count: int, words: list[str]) -> int:
    """Run `p2pllm` with these words in `count` processes, to their end. Returns the exit status."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="p2pllm-ranks-") as folder:
        os.environ[MEETING] = f"{folder}/ranks"
        os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else the agent opens a port
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id="p2pllm",
            rdzv_backend="c10d",
            rdzv_endpoint=f"{folder}/agent",
            rdzv_configs={"store_type": "file"},
            local_addr="localhost",
            max_restarts=0,
        )
        try:
            elastic_launch(config, sys.executable)("-m", "p2pllm", *words)
        except ChildFailedError as failed:  # it has said why itself
            return max(failed.get_first_failure()[1].exitcode, 1)
        except SignalException:  # handed on to the ranks, which have ended
            return 0
        return 0


def is_launched() -> bool:
    """Whether this process is one of those that `launch` started."""
    return MEETING in os.environ and "RANK" in os.environ


def my_ranks() -> "Ranks":
    """This process among those that `launch` started. Returns when all of them have come."""
    from p2pllm.training.ranks import Ranks

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank:  # rank 0 hears of Ctrl+C, and says when it is over
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    return Ranks(rank, size, Path(os.environ[MEETING]))


def on_my_device(config: PeerConfig) -> PeerConfig:
    """Each rank has a GPU of its own, where there are GPUs."""
    import torch

    if config.device not in ("auto", "cuda"):
        return config
    if not (gpus := torch.cuda.device_count()):
        return config
    device = f"cuda:{int(os.environ['LOCAL_RANK']) % gpus}"
    return config.model_copy(update={"device": device})
