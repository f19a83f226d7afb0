#!/usr/bin/env bash
# Lint, types, tests. Arguments go to pytest: bash scripts/test.sh tests/experiments -k digits
set -euo pipefail
source "$(dirname "$0")/setup.sh"
export OMP_NUM_THREADS=1
ruff check .
pyright
python -m pytest -q "$@"
