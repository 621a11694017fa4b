"""One data set cut into a part for each peer: evenly, in unequal sizes, or with unequal labels.

The cuts are functions of row numbers and labels alone. `write_split` makes files of them which say
how they were made, and which come out the same from the same arguments.
"""

import hashlib
import json
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from p2pllm.config.run import DataConfig
from p2pllm.data.sharding import hold_out, permutation
from p2pllm.data.sources import OURS, Record, column_names, columns_of, name_of, read_source
from p2pllm.errors import (
    DatasetEmpty,
    LabelColumnMissing,
    LabelColumnUniform,
    SplitExists,
    SplitTooFine,
)

HELD_OUT = "held-out.jsonl"


@dataclass(frozen=True)
class SplitPlan:
    """How to cut. With neither `by` nor `sizes_alpha` all parts are alike (IID)."""

    peers: int
    by: str | None = None  # a column: each of its values is dealt out unequally
    alpha: float = 0.5  # Dirichlet concentration for that; the smaller, the more unequal
    sizes_alpha: float | None = None  # the same for the sizes of the parts
    seed: int = 1234
    held_out: int | float = 0  # rows, or a fraction of all, kept out of every part
    held_out_by: str | None = None  # whole groups of rows that share this column are kept out


@dataclass(frozen=True)
class Split:
    """Row numbers of each part and of the held-out rows, and the label of every row."""

    parts: list[list[int]]
    held_out: list[int]
    labels: list[str]

    def counts(self, rows: Sequence[int]) -> dict[str, int]:
        """How many rows each label has among these, the most frequent label first."""
        return dict(sorted(Counter(self.labels[i] for i in rows).items(), key=lambda c: (-c[1], c)))


def make_split(records: Sequence[Record], plan: SplitPlan, where: str) -> Split:
    """Cut the rows. Where there is a category, it is the label unless the plan names a column.

    A row that says the same as a held-out row goes into no part.
    Raises: DatasetEmpty, LabelColumnMissing, LabelColumnUniform, HeldOutTooLarge, SplitTooFine.
    """
    if not records:
        raise DatasetEmpty(where=where)
    present = columns_of(records)
    for column in (plan.by, plan.held_out_by):
        if column is not None and column not in present:
            raise LabelColumnMissing(where=where, column=column, present=", ".join(present))
    labels = [str(record.get(plan.by or "category") or "") for record in records]
    if plan.by is not None and len(set(labels)) == 1:
        raise LabelColumnUniform(where=where, column=plan.by, value=labels[0])
    training, held = list(range(len(records))), list[int]()
    if plan.held_out:
        column = plan.held_out_by
        groups = [str(record.get(column) or "") for record in records] if column else None
        training, held = hold_out(len(records), plan.held_out, plan.seed, groups)
    seen = {_said(records[i], present) for i in held}
    rows = [i for i in training if _said(records[i], present) not in seen]
    if len(rows) < plan.peers:
        raise SplitTooFine(where=where, rows=len(rows), peers=plan.peers)
    cut = _by_label([labels[i] for i in rows], plan) if plan.by else _by_size(len(rows), plan)
    return Split([sorted(rows[i] for i in part) for part in cut], held, labels)


def write_split(config: DataConfig, plan: SplitPlan, folder: Path) -> Split:
    """Write shard-000.jsonl and so on, held-out.jsonl if rows are held out, and split.json.

    Raises: SplitExists, those of `make_split` and of `read_source`, and OSError.
    """
    if folder.exists() and any(folder.iterdir()):
        raise SplitExists(folder=folder)
    records, where = read_source(config), name_of(config)
    split = make_split(records, plan, where)
    draft = folder.parent / f".unfinished-{folder.name}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    files = {f"shard-{number:03}.jsonl": part for number, part in enumerate(split.parts)}
    if split.held_out:
        files[HELD_OUT] = split.held_out
    about = [
        _write(draft / name, [records[i] for i in rows]) | {"labels": split.counts(rows)}
        for name, rows in files.items()
    ]
    facts = {
        "source": where,
        "rows": len(records),
        "left_out": len(records) - sum(map(len, files.values())),
        "plan": asdict(plan),
        "files": about,
    }
    (draft / "split.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    if folder.exists():
        folder.rmdir()
    draft.rename(folder)
    return split


def _by_size(count: int, plan: SplitPlan) -> list[list[int]]:
    order = permutation(count, "split", plan.seed)
    if plan.sizes_alpha is None:
        return [order[peer :: plan.peers] for peer in range(plan.peers)]
    shares = _dirichlet([plan.sizes_alpha] * plan.peers, random.Random(f"sizes:{plan.seed}"))
    return _none_empty(_dealt(order, shares))


def _by_label(labels: Sequence[str], plan: SplitPlan) -> list[list[int]]:
    """Each label's rows go to the peers in shares of their own (Hsu et al. 2019, "Measuring the
    Effects of Non-Identical Data Distribution"), around the peers' sizes where these differ."""
    uniform = random.Random(f"labels:{plan.seed}")
    sizes = [1 / plan.peers] * plan.peers
    if plan.sizes_alpha is not None:
        sizes = _dirichlet([plan.sizes_alpha] * plan.peers, random.Random(f"sizes:{plan.seed}"))
    parts: list[list[int]] = [[] for _ in range(plan.peers)]
    for label in sorted(set(labels)):
        rows = [i for i, of in enumerate(labels) if of == label]
        order = [rows[i] for i in permutation(len(rows), "split", plan.seed, label)]
        shares = _dirichlet([plan.alpha * plan.peers * size for size in sizes], uniform)
        for part, dealt in zip(parts, _dealt(order, shares), strict=True):
            part += dealt
    return _none_empty(parts)


def _dirichlet(alphas: Sequence[float], uniform: random.Random) -> list[float]:
    draws = [uniform.gammavariate(max(alpha, 1e-3), 1.0) for alpha in alphas]
    if not sum(draws):  # all of them too small for a float: one peer gets everything
        draws[int(uniform.random() * len(draws))] = 1.0
    return [draw / sum(draws) for draw in draws]


def _dealt(order: Sequence[int], shares: Sequence[float]) -> list[list[int]]:
    """Consecutive stretches of `order` in these shares, rounded so that none is lost."""
    ends, total = [], 0.0
    for share in shares:
        total += share
        ends.append(round(total * len(order)))
    ends[-1] = len(order)
    return [list(order[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]


def _none_empty(parts: list[list[int]]) -> list[list[int]]:
    """A peer without any row could not train: it gets one of whoever has most."""
    for part in parts:
        if not part:
            part.append(max(parts, key=len).pop())
    return parts


def _said(record: Record, present: Sequence[str]) -> tuple[str, ...]:
    """What a row says, its category left aside."""
    names = column_names(present, {})
    texts = [names[ours] for ours in OURS if ours in names and ours != "category"]
    return tuple(str(record.get(column) or "").strip() for column in texts or present)


def _write(path: Path, records: Sequence[Record]) -> dict[str, Any]:
    lines = [json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records]
    written = "".join(lines).encode()
    path.write_bytes(written)
    digest = hashlib.sha256(written).hexdigest()
    return {"file": path.name, "rows": len(records), "sha256": digest}
