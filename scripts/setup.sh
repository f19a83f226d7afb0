#!/usr/bin/env bash
# Make or reuse .venv with hypergrad and its extras in it, and put it first in PATH. Sourced by the other scripts.
# PYTHON=python3.12 bash scripts/... chooses the interpreter that .venv is made with.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

python=${PYTHON:-python3}
if ! command -v "$python" >/dev/null; then
    echo "setup: no '$python' in PATH. Install Python 3.11 or newer, or name one: PYTHON=python3.12 bash $0" >&2
    exit 1
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "setup: '$python' is $("$python" --version 2>&1); hypergrad needs Python 3.11 or newer." >&2
    echo "       Name another one: PYTHON=python3.12 bash $0" >&2
    exit 1
fi
if [ ! -x .venv/bin/python ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
        echo "setup: '$python' cannot make virtual environments (no venv or ensurepip)." >&2
        echo "       On Debian and Ubuntu: apt-get install python3-venv" >&2
        exit 1
    fi
    echo "setup: making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv || exit 1
fi
PATH="$PWD/.venv/bin:$PATH"
export PATH

# The stamp is the pyproject.toml that was installed last, and where: a moved clone installs anew.
stamp=.venv/installed-for
if ! { pwd && cat pyproject.toml; } | cmp -s - "$stamp"; then
    echo "setup: installing hypergrad with its extras into .venv (the first time takes minutes: torch is large)"
    python -m pip install --quiet --disable-pip-version-check -e '.[experiments,search,ray,lightning,transformers,accelerate,skorch,docs,dev]' || exit 1
    { pwd && cat pyproject.toml; } >"$stamp"
fi
