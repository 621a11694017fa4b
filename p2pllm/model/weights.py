"""The identity of a base model: one hash over its weights, however they are split into files.

Only headers and raw bytes are read; no tensor is built. Pickle files are never opened.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from p2pllm.errors import SafetensorsMissing, WeightsUnreadable
from p2pllm.model.cache import cache_folder

INDEX = "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself
CHUNK = 1 << 22  # bytes held in memory at a time


@dataclass(frozen=True)
class Span:
    """Where one tensor's bytes lie, and what they mean."""

    file: Path
    start: int
    length: int
    dtype: str
    shape: tuple[int, ...]


def weights_sha256(folder: Path) -> str:
    """sha256 (hex) over name, dtype, shape and bytes of every tensor, in the order of names.

    Hashing 1 GB takes about a second, so the result is remembered for files of the same path,
    size and modification time.

    Raises:
        SafetensorsMissing: no safetensors weights there.
        WeightsUnreadable: a file is cut short or is not in the format.
    """
    files = weight_files(folder)
    stats = [(str(file.resolve()), file.stat()) for file in files]
    known = repr([(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats])
    remembered = cache_folder() / "hashes" / hashlib.sha256(known.encode()).hexdigest()
    if remembered.is_file():
        return remembered.read_text()
    found = _hash(files)
    remembered.parent.mkdir(parents=True, exist_ok=True)
    unfinished = remembered.with_suffix(f".{os.getpid()}")
    unfinished.write_text(found)
    unfinished.replace(remembered)
    return found


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers would load: model.safetensors, or those that the index names."""
    if (single := folder / "model.safetensors").is_file():
        return [single]
    try:
        index = json.loads((folder / INDEX).read_text())
        names = sorted(set(index["weight_map"].values()))
    except FileNotFoundError:
        raise SafetensorsMissing(folder=folder) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsUnreadable(path=folder / INDEX, reason=error) from error
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise WeightsUnreadable(path=folder / name, reason="the index names it; it is not here")
    return [folder / name for name in names]


def _hash(files: list[Path]) -> str:
    spans: dict[str, Span] = {}
    for file in files:
        spans.update(_spans(file))
    total = hashlib.sha256()
    for name in sorted(spans):
        span = spans[name]
        total.update(json.dumps([name, span.dtype, list(span.shape), span.length]).encode())
        with span.file.open("rb") as stream:
            stream.seek(span.start)
            left = span.length
            while left and (chunk := stream.read(min(left, CHUNK))):
                total.update(chunk)
                left -= len(chunk)
        if left:
            raise WeightsUnreadable(path=span.file, reason=f"it ends within {name}")
    return total.hexdigest()


def _spans(file: Path) -> dict[str, Span]:
    """The format: 8 bytes header length, a JSON header, then the tensors' bytes."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > LONGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        return {name: _span(file, 8 + length, entry) for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsUnreadable(path=file, reason=error) from error


def _span(file: Path, first: int, entry: dict[str, list[int]]) -> Span:
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not 0 <= start <= end:
        raise ValueError(f"offsets {start}..{end}")
    return Span(file, first + start, end - start, str(entry["dtype"]), shape)
