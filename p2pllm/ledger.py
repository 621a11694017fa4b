"""What happened in each round of one peer, told from its ledger.jsonl."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from p2pllm.errors import LedgerMissing, RoundUnknown
from p2pllm.journal import LEDGER

Row = dict[str, Any]


def find_ledger(place: Path) -> Path:
    """The ledger in a peer's folder, or the one below `place` that was written last.

    Raises LedgerMissing.
    """
    if (place / LEDGER).exists():
        return place / LEDGER
    found = sorted(place.glob(f"**/{LEDGER}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise LedgerMissing(place=place)
    return found[-1]


def read_ledger(path: Path) -> list[Row]:
    """Its rows in order; a line that a killed process left half written is passed over."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def story(rows: Sequence[Row], round: int) -> list[str]:
    """One round in plain words, a line for each thing that happened. Raises RoundUnknown."""
    # A peer that catches up to round n + 1 thereby ends its round n.
    of_round = [r for r in rows if r["round"] - (r["event"] == "caught_up") == round]
    if not of_round:
        known = sorted({r["round"] for r in rows})
        raise RoundUnknown(round=round, known=", ".join(map(str, known)) or "none")
    return [f"{_clock(row)}  {line}" for row in of_round for line in _told(row)]


def _told(row: Row) -> list[str]:
    match row["event"]:
        case "round_committed":
            return _committed(row)
        case "round_missed":
            blamed = f" (because of {', '.join(row['culprits'])})" if row["culprits"] else ""
            return [f"missed: {row['reason']}{blamed}; the local work was kept"]
        case "caught_up":
            return [
                f"caught up to round {row['round']} from {', '.join(row['donors'])} "
                f"in {row['seconds']:.2f} s"
            ]
    return [str(row["event"])]


def _committed(row: Row) -> list[str]:
    lines = [
        f"trained {row['seconds_training']:.1f} s on {row['samples']} samples, "
        f"loss {row['loss'] if row['loss'] is not None else float('nan'):.4f}",
        f"waited {row['seconds_waiting']:.2f} s for the group; "
        f"the deadline was {row['deadline']:.0f} s",
    ]
    lines += [f"left out: {name}, {why}" for name, why in row["left_out"].items()]
    lines += [f"cut down: {name}, {why}" for name, why in row["cut_down"].items()]
    lines.append(
        f"averaged with {', '.join(sorted(row['peers']))} in {row['seconds_averaging']:.2f} s, "
        f"{row['bytes_sent']:,} bytes sent and {row['bytes_received']:,} received"
    )
    lines.append(f"committed: adapter {row['digest'][:8]} of round {row['round'] + 1}")
    return lines


def _clock(row: Row) -> str:
    return datetime.fromtimestamp(row["time"], UTC).astimezone().strftime("%H:%M:%S")
