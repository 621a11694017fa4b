"""A script around transformers.Trainer as a peer, beside one of ours."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from p2pllm.config.run import RandomInit
from p2pllm.model.adapter import adapter_values
from p2pllm.model.random_init import random_model
from tests.swarm.peer import LOADED
from tests.swarm.processes import Processes, environment

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(240)]

SCRIPT = Path(__file__).parents[2] / "peers/hf-trainer/finetune.py"
ROUNDS = 3


@pytest.mark.parametrize("rule", ["both", "alternate"])
def test_a_script_and_a_trainer_end_with_one_adapter(processes: Processes, tmp_path, rule):
    model = random_model(RandomInit(), 7)
    settings = (
        "model.random_init=null",
        f"model.name={model}",
        f"rounds={ROUNDS}",
        f"averaging.lora={rule}",
        "averaging.min_peers=2",
        "training.local.steps=3",
    )
    door = processes.bootstrap(*settings)
    bob = processes.trainer("bob", door.address)
    data = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"what is {n}", "response": "a number"} for n in range(20)]
    data.write_text("\n".join(map(json.dumps, rows)))
    script = subprocess.run(
        [
            *(sys.executable, str(SCRIPT), "--model", str(model), "--data", str(data)),
            *("--initial-peers", door.address, "--name", "script", "--output", str(tmp_path)),
            *("--rank", "4", "--alpha", "8"),
        ],
        cwd=tmp_path,
        env=environment() | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=LOADED,
        check=False,
    )
    assert script.returncode == 0, script.stderr[-3000:]
    bob.finish(LOADED)
    [home] = tmp_path.glob("*/script")
    told = [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
    commits = [row for row in told if row["event"] == "round_committed"]
    assert [row["round"] for row in commits] == list(range(ROUNDS))
    assert all(sorted(row["peers"]) == ["bob", "script"] for row in commits)
    assert all(row["samples"] == 12 for row in commits)
    steps = [row for row in told if row["event"] == "step_done"]
    assert len(steps) == 3 * ROUNDS
    assert {row["learning_rate"] for row in steps} == {2e-3}  # the run's, and not the script's
    [mine] = {row["digest"] for row in told if row["event"] == "finished"}
    assert mine == bob.events("finished")[0]["digest"]
    assert (adapter_values(home / "final") == adapter_values(bob.home / "final")).all()
