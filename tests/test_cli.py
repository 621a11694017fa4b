"""The command line: it teaches, it is quick, and what the README shows is what it takes."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import p2pllm
from p2pllm.cli import app

ROOT = Path(__file__).parent.parent
RUNNER = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
CONFIG_CHECK = (sys.executable, "-m", "p2pllm", "config", "check", "configs/demo.yaml")
COMMANDS = (
    *("demo", "train", "bootstrap", "join", "aggregate", "status", "rounds", "explain"),
    "data split",
)
PAGES = ("README.md", *(f"peers/{role}/README.md" for role in ("bootstrap", "trainer", "laptop")))


def help_of(*words):
    result = RUNNER.invoke(app, [*words, "--help"])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example(command):
    assert f"Example: p2pllm {command}" in help_of(*command.split())


def test_help_tells_the_environment_variables():
    for name in ("P2PLLM_INITIAL_PEERS", "P2PLLM_NAME", "P2PLLM_OUTPUT", "P2PLLM_IDENTITY"):
        assert name in help_of("join")


def test_the_version_is_the_packages():
    assert RUNNER.invoke(app, ["--version"]).output.strip() == f"p2pllm {p2pllm.__version__}"


def test_help_comes_without_the_heavy_imports():
    code = (
        "import sys, p2pllm.cli\n"
        "heavy = {'torch', 'hivemind', 'transformers', 'datasets', 'peft', 'pydantic', 'numpy'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def shown_commands():
    for page in PAGES:
        text = (ROOT / page).read_text().replace("\\\n", " ")
        for block in re.findall(r"```shell\n(.*?)```", text, re.S):
            for line in block.splitlines():
                words = shlex.split(line.split("  #")[0].strip())
                if words and words[0].endswith("p2pllm"):
                    yield pytest.param(words[1:], id=f"{page}: {' '.join(words[1:4])}")


@pytest.mark.parametrize("words", list(shown_commands()))
def test_the_commands_of_the_readmes_exist_with_their_options(words):
    command = words[:2] if words[0] in ("config", "data") else words[:1]
    known = help_of(*command)
    for word in words:
        if word.startswith("--"):
            assert word in known


def test_no_address_is_a_letter_that_names_the_option():
    result = subprocess.run(
        [sys.executable, "-m", "p2pllm", "join"], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 1
    assert "--initial-peers" in result.stderr
    assert "Traceback" not in result.stderr


def test_config_check_tells_the_fingerprint_and_the_nearest_name():
    good = RUNNER.invoke(app, ["config", "check", str(ROOT / "configs/demo.yaml")])
    assert re.search(r"fingerprint [0-9a-f]{64}", good.output)
    bad = subprocess.run(
        [*CONFIG_CHECK, "--set", "training.batchsize=4"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert bad.returncode == 1
    assert "did you mean training.batch_size" in bad.stderr


def test_config_show_loads_again(tmp_path):
    shown = RUNNER.invoke(app, ["config", "show", str(ROOT / "configs/demo.yaml")])
    again = tmp_path / "demo.yaml"
    again.write_text(shown.output)
    checked = RUNNER.invoke(app, ["config", "check", str(again)])
    assert checked.exit_code == 0
    assert shown.output.split("\n")[0].split()[-1] in checked.output


def test_rounds_without_a_ledger_is_a_letter(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "p2pllm", "rounds", str(tmp_path)], capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "ledger.jsonl" in result.stderr
