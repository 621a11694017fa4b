"""How fast a local step is, beside plain transformers.Trainer + PEFT: the same model, rows, batches
and optimizer, in turns, in one process.

Seconds are counted from the end of the first step of a turn to the end of its last, so that neither
pays for its start; everything in between counts, the loading of rows too.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import (
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from p2pllm.config.load import load_run
from p2pllm.config.run import RunConfig
from p2pllm.data.corpus import load_corpus
from p2pllm.data.tokens import Row
from p2pllm.model.adapter import Adapter, attach_adapter
from p2pllm.model.pretrained import load_base
from p2pllm.training.learner import Learner
from p2pllm.training.source import ShardSource
from tests.benchmarks.report import about

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests/benchmarks/results"
BARS = {"padded": 1.0, "equal lengths": 0.95}  # our tokens/s over theirs, at least


class Ours:
    """Our learner."""

    def __init__(self, run: RunConfig, adapter: Adapter, rows: Sequence[Row]) -> None:
        self._rows = rows
        self._learner = Learner(adapter, ShardSource(rows, [0], run.seed), run)

    def turn(self) -> tuple[float, float]:
        """Seconds, and the mean loss."""
        ends = list[float]()
        self._learner.source = InOrder(self._rows)
        work = self._learner.train(0, lambda step: ends.append(time.perf_counter()), lambda: False)
        return ends[-1] - ends[0], work.loss


class InOrder:
    """The rows one after the other."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows, self._at = rows, 0

    @property
    def rows(self) -> int:
        return len(self._rows)

    def next_batch(self, n: int) -> list[Row]:
        self._at += n
        return list(self._rows[self._at - n : self._at])


class Theirs:
    """transformers.Trainer, which pads each batch to its longest row."""

    def __init__(self, run: RunConfig, adapter: Adapter, rows: Sequence[Row], folder: str) -> None:
        class Sequential(Trainer):
            def _get_train_sampler(self, *_: Any) -> Any:
                return SequentialSampler(rows)

        self._clock = Clock()
        self._trainer = Sequential(
            model=adapter.model,
            train_dataset=[
                {"input_ids": list(r.input_ids), "labels": list(r.labels)} for r in rows
            ],
            data_collator=DataCollatorForSeq2Seq(adapter.tokenizer),
            callbacks=[self._clock],
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=run.training.batch_size,
                num_train_epochs=1,
                learning_rate=run.training.learning_rate,
                lr_scheduler_type="constant",
                optim="adamw_torch",
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
            ),
        )

        self._trainer.remove_callback(PrinterCallback)

    def turn(self) -> tuple[float, float]:
        self._clock.ends.clear()
        done = self._trainer.train()
        return self._clock.ends[-1] - self._clock.ends[0], done.training_loss


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def measure(name: str, run: RunConfig, rows: Sequence[Row], repeats: int) -> dict[str, Any]:
    """Both in turns; each begins as often as the other."""
    with tempfile.TemporaryDirectory() as folder:
        systems: dict[str, Any] = {
            "ours": Ours(run, fresh_adapter(run), rows),
            "theirs": Theirs(run, fresh_adapter(run), rows, folder),
        }
        tokens = sum(len(row.input_ids) for row in rows[run.training.batch_size :])
        speeds: dict[str, list[float]] = {system: [] for system in systems}
        losses: dict[str, list[float]] = {system: [] for system in systems}
        for turn in range(repeats + 1):
            for system in sorted(systems, reverse=bool(turn % 2)):
                seconds, loss = systems[system].turn()
                losses[system].append(loss)
                if turn:  # the first warms up
                    speeds[system].append(tokens / seconds)
    ratios = [a / b for a, b in zip(speeds["ours"], speeds["theirs"], strict=True)]
    return {"rows": name, "tokens": tokens, "speeds": speeds, "losses": losses, "ratios": ratios}


def fresh_adapter(run: RunConfig) -> Adapter:
    return attach_adapter(load_base(run.model, run.seed), run.lora, run.seed)


def two_kinds(run: RunConfig, steps: int) -> dict[str, list[Row]]:
    """Rows as they are, and the same tokens cut into rows of equal length that all count."""
    base = load_base(run.model, run.seed)
    wanted = steps * run.training.batch_size
    rows = load_corpus(run.data, base.tokenizer, run.seed).train
    length = run.data.max_length
    stream = [i for row in rows for i in row.input_ids]
    cut = [tuple(stream[n * length : (n + 1) * length]) for n in range(wanted)]
    return {"padded": rows[:wanted], "equal lengths": [Row(ids, ids) for ids in cut]}


def markdown(found: dict[str, Any]) -> str:
    facts = found["about"]
    lines = [
        "# How fast a local step is, beside transformers.Trainer + PEFT",
        "",
        f"`{facts['command']}`, {facts['date']}, {facts['cpu']}, {facts['cores']} cores, "
        f"load {facts['load_before'][0]:.1f} before and {facts['load_after'][0]:.1f} after.",
        "Medians of the turns, in brackets the least and the most; the ratio is that of turns side",
        "by side. Losses are means over tokens (ours) and over steps (theirs).",
        "",
        "| rows | ours, tokens/s | theirs, tokens/s | ratio | bar | first loss, ours and theirs |",
        "|---|---|---|---|---|---|",
    ]
    for case in found["cases"]:
        bar = BARS[case["rows"]]
        verdict = "met" if statistics.median(case["ratios"]) >= bar else "**missed**"
        first = " and ".join(f"{case['losses'][s][0]:.4f}" for s in ("ours", "theirs"))
        lines.append(
            f"| {case['rows']} | {_spread(case['speeds']['ours'], 0)} "
            f"| {_spread(case['speeds']['theirs'], 0)} | {_spread(case['ratios'], 2)} "
            f"| {bar} {verdict} | {first} |"
        )
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float], digits: int) -> str:
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench-step", description=__doc__)
    parser.add_argument("--run", type=Path, default=ROOT / "configs/demo.yaml")
    parser.add_argument("--steps", type=int, default=9, help="in one turn")
    parser.add_argument("--repeats", type=int, default=9, help="turns of each")
    parser.add_argument("--quick", action="store_true", help="3 turns; writes no results")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    command = shlex.join(["python", "-m", "tests.benchmarks.bench_step", *sys.argv[1:]])
    settings = (f"training.local.steps={chosen.steps}", "rounds=1", "lora.dropout=0")
    run = load_run(chosen.run, settings)
    found: dict[str, Any] = {"about": about(command), "cases": []}
    for name, rows in two_kinds(run, chosen.steps).items():
        found["cases"].append(measure(name, run, rows, 3 if chosen.quick else chosen.repeats))
    found["about"]["load_after"] = list(os.getloadavg())
    text = markdown(found)
    if not chosen.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "step.md").write_text(text)
        (RESULTS / "step.json").write_text(json.dumps(found) + "\n")
    print(text)


if __name__ == "__main__":
    main()
