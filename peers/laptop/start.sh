#!/usr/bin/env bash
# Start a trainer on this laptop, at low priority: peers/laptop/start.sh ADDR [ADDR ...]
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${1:?give the address of a peer of the run, as its bootstrap peer prints it}"
exec nice -n 10 .venv/bin/p2pllm join --initial-peers "$*" --config peers/laptop/peer.yaml
