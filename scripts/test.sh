#!/usr/bin/env bash
# Lint, types and tests.
#   bash scripts/test.sh                   ruff, pyright, the examples in docstrings and the fast tests: 4 minutes on 2 cores
#   bash scripts/test.sh --all             the same with the tests marked slow: 40 minutes on 2 cores; what .ci/run calls
#   bash scripts/test.sh --release         before a release, by hand: scripts/release.py, which writes experiments/results/release.json
#   bash scripts/test.sh tests/search -k x any other arguments go to pytest, which runs what they select in one process
set -euo pipefail
source "$(dirname "$0")/setup.sh"
export OMP_NUM_THREADS=1
if [ "${1:-}" = --release ]; then
    exec python scripts/release.py "${@:2}"
fi
ruff check .
if [ $# -gt 0 ] && [ "$1" != --all ]; then
    pyright
    exec python -m pytest -q "$@"
fi
pyright & # beside the examples, and beside the fast tests as far as it takes longer
types=$!
python -m pytest -q --durations=0 --durations-min=5 --doctest-modules --doctest-ignore-import-errors hypergrad || {
    wait "$types"
    exit 1
}
# loadgroup: tests of one group (those that start Ray, see tests/conftest.py) run one after the other
if [ "${1:-}" = --all ]; then
    wait "$types"
    exec python -m pytest -q -n 2 --dist loadgroup "${@:2}"
fi
tests=0
python -m pytest -q -n 2 --dist loadgroup -m "not slow" || tests=$?
wait "$types" || {
    echo "pyright found errors: its lines are above" >&2
    exit 1
}
exit "$tests"
