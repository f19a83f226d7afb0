#!/usr/bin/env bash
# Train a real classifier from an lr and a weight decay that start 1000 times wrong, tuned while it trains.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
export OMP_NUM_THREADS=1
python -m experiments.quickstart "$@"
