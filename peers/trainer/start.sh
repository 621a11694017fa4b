#!/usr/bin/env bash
# Start a trainer on this GPU machine: peers/trainer/start.sh ADDR [ADDR ...]
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${1:?give the address of a peer of the run, as its bootstrap peer prints it}"
exec .venv/bin/p2pllm join --initial-peers "$*" --config peers/trainer/peer.yaml
