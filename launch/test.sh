#!/usr/bin/env bash
# Everything that must hold before a change is merged: format, lint, types, tests. Arguments go to pytest:
#   bash launch/test.sh                      all of it
#   bash launch/test.sh tests/test_images.py -k bicubic
set -euo pipefail
cd "$(dirname "$0")/.."

bash launch/setup_venv.sh test
bin=.venv/bin

timed() { # timed NAME COMMAND...
    local started=$SECONDS name=$1
    shift
    echo "== $name"
    "$@"
    echo "   $name: $((SECONDS - started)) s"
}

timed "format" "$bin/python" -m ruff format --check --diff .
timed "lint" "$bin/python" -m ruff check .
timed "types" "$bin/python" -m mypy sr3_jax/diffusion
timed "shell" "$bin/shellcheck" launch/*.sh .ci/run
echo "== tests ($SECONDS s so far)"
# One worker a core of a small machine. pytest's own summary, with its time, is the last line.
exec "$bin/python" -m pytest -n 2 --durations=10 "$@" </dev/null
