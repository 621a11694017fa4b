# p2pllm's everyday commands. `pip install rust-just` brings just; every recipe sets itself up first.

set positional-arguments

# Lists the recipes
_default:
    @just --list --unsorted

# Makes .venv from pyproject.toml and constraints.txt; does nothing when it is up to date
[private]
setup:
    #!/usr/bin/env bash
    set -euo pipefail
    wanted() { pwd; cat pyproject.toml constraints.txt; }
    stamp=.venv/setup-stamp # what .venv was made from
    if wanted | cmp --silent - "$stamp"; then exit; fi
    for python in python3.11 python3 ''; do
        if [ -z "$python" ]; then
            echo "p2pllm needs Python 3.11 or newer. On Debian: apt install python3 python3-venv" >&2
            exit 1
        fi
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi
    done
    echo "Setting up .venv with $("$python" --version): a minute or two, once."
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
    wanted > "$stamp"

# Starts a whole swarm on this machine and fine-tunes a real model; options go to `p2pllm demo`
demo *ARGS: setup
    @.venv/bin/p2pllm demo "$@"

# Runs all there is to check: lint, types, layers, unit tests, then real processes on loopback
test: check test-swarm

# Runs lint, types, layers and the unit tests: no network, under a minute
check: setup
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    .venv/bin/mypy
    .venv/bin/lint-imports
    .venv/bin/pytest -m "not swarm and not faults" -n 2 --dist worksteal

# Runs the swarm tests: real peers, processes and sockets on loopback
test-swarm *ARGS: setup
    .venv/bin/pytest -m swarm -n 2 --dist loadfile "$@"

# Runs the fault matrix: half an hour, root for network namespaces; or `just test-faults CASE…`
test-faults *ARGS: setup
    .venv/bin/python -m tests.faults.matrix "$@"

# Times rounds on loopback, ours beside stock hivemind and gloo: a quarter of an hour, or --quick
bench-round *ARGS: setup
    .venv/bin/python -m tests.benchmarks.bench_round "$@"

# Times rounds over shaped and delayed lines between network namespaces; needs root and Linux
bench-wire *ARGS: setup
    .venv/bin/python -m tests.benchmarks.bench_wire "$@"

# Times local steps, ours beside transformers.Trainer + PEFT: ten minutes, or --quick
bench-step *ARGS: setup
    .venv/bin/python -m tests.benchmarks.bench_step "$@"

# Measures what part of its time a peer trains, with and without overlap: 15 minutes; needs root
bench-utilisation *ARGS: setup
    .venv/bin/python -m tests.benchmarks.bench_utilisation "$@"

# Compares what a swarm learns with what one machine does, by setting: half an hour, or --quick
bench-learning *ARGS: setup
    .venv/bin/python -m tests.benchmarks.bench_learning "$@"

# Runs 300 rounds and prints what grows: memory, threads, open files, processes
bench-leaks *ARGS: setup
    .venv/bin/python -m tests.benchmarks.bench_leaks "$@"

# Mends what ruff can mend by itself
fix: setup
    .venv/bin/ruff check --fix .
    .venv/bin/ruff format .
