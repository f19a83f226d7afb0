#!/usr/bin/env bash
# Everything that must run on CUDA, in one go. Says so and ends well where there is no GPU.
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
