"""The folder of things that are made once on a machine and used by every peer on it.

It knows how to make a thing exactly once: under a lock, beside its final place, and then renamed,
so that nobody ever sees half of it. It does not know what the things are.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def cache_folder() -> Path:
    """$P2PLLM_CACHE, or ~/.cache/p2pllm."""
    return Path(os.environ.get("P2PLLM_CACHE") or Path.home() / ".cache" / "p2pllm").expanduser()


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The folder models/<name> of the cache; `make` fills it if it is not there yet.

    Two processes at once make it once: the second waits for the first. If `make` raises, nothing
    remains, and the next call tries again.
    """
    folder = cache_folder() / "models" / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The lock is held by an open file, so it ends with its process, however that dies.
    with FileLock(folder.parent / f".{name}.lock"):
        if not folder.is_dir():
            unfinished = folder.parent / f".{name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)  # left by a killed process
            unfinished.mkdir()
            try:
                make(unfinished)
                unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return folder
