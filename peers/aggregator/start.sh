#!/usr/bin/env bash
# Start the run's aggregator: peers/aggregator/start.sh ADDR [ADDR ...]
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${1:?give the address of a peer of the run, as its bootstrap peer prints it}"
exec .venv/bin/p2pllm aggregate --initial-peers "$*" --config peers/aggregator/peer.yaml
