#!/usr/bin/env bash
# What must be seen on a GPU, in two commands of at most five minutes. Says so and ends well where there is no GPU.
#   bash scripts/gpu_check.sh correct    is hypergrad right there?    → experiments/results/gpu_correct.json
#   bash scripts/gpu_check.sh speed      what does it cost there?     → experiments/results/gpu_speed.json
# A machine with a GPU often has its own torch and no network, so python3 (or PYTHON) is used as it is if it sees the GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
for python in "${PYTHON:-python3}" .venv/bin/python; do
    if "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null; then
        exec "$python" -m experiments.gpu_check "$@"
    fi
done
if ! command -v nvidia-smi >/dev/null; then
    echo "gpu_check: no GPU on this machine, so nothing was checked."
    exit 0
fi
source scripts/setup.sh
python -m experiments.gpu_check "$@"
